"""Images count as the patches that a model makes of them."""

from types import SimpleNamespace

from d2dmoe.data import Batches
from d2dmoe.vocabulary import patches_of


def test_an_image_counts_as_its_patches():
    sizes = {"image_size": 32, "patch_size": 4}
    assert patches_of(SimpleNamespace(**sizes)) == 64
    assert patches_of(SimpleNamespace(image_size=[32, 16], patch_size=(4, 8))) == 16
    assert patches_of(SimpleNamespace(vision_config=SimpleNamespace(**sizes))) == 64
    assert patches_of(SimpleNamespace(image_size=32)) == patches_of(SimpleNamespace()) == 1
    images = Batches([{"image": None}] * 10, 2, image_tokens=64)
    assert images.tokens == 640
    assert len(images.first(200).items) == 4
    assert len(images.after(200).items) == 6
    assert images.shuffled(0).first(65).tokens == 128
