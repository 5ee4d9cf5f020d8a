"""The vision-language adapter tells the truth, and refuses what it does not know."""

from qcore.testing import check_adapter
from qplug_multimodal.adapter import VisionLanguage
from qplug_multimodal.testing import llava_batch, qwen_batch, tiny_llava, tiny_qwen2_vl

LLAVA = llava_batch((3, "i", 4), (2, "i", 5))
QWEN = qwen_batch((3, "i", 4), (2, "i", 1, "i", 2))


def test_links_of_tiny_llava_are_true():
    check_adapter(VisionLanguage(), tiny_llava(), LLAVA)


def test_links_of_a_llava_that_reads_the_last_layer_are_true():
    check_adapter(VisionLanguage(), tiny_llava(feature_layer=-1), LLAVA)


def test_links_of_a_llava_with_siglip_are_true():
    check_adapter(VisionLanguage(), tiny_llava("siglip"), LLAVA)


def test_links_of_tiny_qwen2_vl_are_true():
    check_adapter(VisionLanguage(), tiny_qwen2_vl(), QWEN)
