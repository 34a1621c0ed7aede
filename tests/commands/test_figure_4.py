"""Figure 4: networks of ImageNet's form, from a tree of class folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.cases import shaken
from helpers.command_line import pathnet_
from PIL import Image

from pathnet import data, lesion, models, results
from pathnet.experiments.errors import ErrorCount


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("data") / "pictures", np.random.default_rng(0)
    for split, images in (("train", 4), ("val", 5)):
        for kind in ("cat", "dog", "owl"):
            (folder / split / kind).mkdir(parents=True)
            for number in range(images):
                pixels = rng.integers(0, 256, (40, 36, 3), np.uint8)
                Image.fromarray(pixels).save(folder / split / kind / f"{number}.png")
    return folder


@pytest.mark.parametrize(("depth", "blocks", "changing"), [(50, 16, [0, 3, 7, 13]), (200, 66, [0, 3, 27, 63])])
def test_figure_4_is_drawn_from_a_tree_of_class_folders(
    tree: Path, tmp_path: Path, depth: int, blocks: int, changing: list[int]
) -> None:
    torch.manual_seed(0)
    net = shaken(models.preact_resnet_imagenet(depth, 3, 1)).eval()
    models.save(net, tmp_path / "net=1.safetensors")
    flags = ["--data", tree, "--weights", tmp_path / "net=1.safetensors", "--out", tmp_path / "study"]
    ended = pathnet_("lesion-single", *flags)
    assert ended.status == 0, ended.err
    assert ended.out.splitlines()[0] == f"pictures; residual, depth {depth}, width 1, {blocks} blocks"
    run = results.read(tmp_path / "study" / "lesion-single")
    rows = run.rows(ErrorCount)
    assert run.identity["networks"]["residual"][0]["downsampling"] == changing
    assert [row.deleted for row in rows] == [(), *((i,) for i in range(blocks))]
    images = data.load(str(tree))
    batch, labels = next(images.test_batches(15))
    with torch.no_grad():
        for row in (rows[0], rows[1], rows[5], rows[-1]):
            answers = lesion.delete(net, row.deleted)(batch).argmax(1)
            assert row.wrong == int((answers != labels).sum()) and row.images == 15
    assert "recipes" not in run.facts["results"] and "matters more" in ended.out
    assert not (tmp_path / "study" / "networks").exists()
