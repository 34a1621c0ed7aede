// Memory for batches, which keeps its pages from one step of a training to the next.
//
// A step of ResNet-110 writes half a gigabyte of activations, which the backward pass frees. malloc returns that much
// to the system, so the next step takes a fault for each of 130,000 pages: a sixth of the step. Here freed memory
// waits for the next request of its size, with its pages; marked as free, so that the system takes them back when it
// is short of memory.
#pragma once

#include <cstddef>

namespace pathnet::cpu {

// Returns at least `bytes`, not set to anything, aligned to a line of the cache. Throws std::bad_alloc.
void* take_memory(size_t bytes);
void give_memory_back(void* memory);

}  // namespace pathnet::cpu
