"""Benchmarks: on a GPU tests, memory checks and timings (`benchmarks.gpu`), on a processor timings
(`benchmarks.cpu`)."""
