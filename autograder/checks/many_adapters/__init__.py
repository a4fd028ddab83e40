"""Checks of unit 13_many_adapters: one base, many LoRA adapters (Sheng et al. 2023, arXiv 2311.03285; Chen et al. 2023, arXiv 2310.18547)."""

from autograder.checks.many_adapters.adapter_cache import check_adapter_cache
from autograder.checks.many_adapters.batched_lora import check_batched_lora
from autograder.checks.many_adapters.combine import check_combine
from autograder.checks.many_adapters.gathered import check_gathered
from autograder.checks.many_adapters.prefix_cache import check_prefix_cache
from autograder.checks.many_adapters.segmented import check_segmented

EXERCISES = {
    "check_gathered": check_gathered,
    "check_segmented": check_segmented,
    "check_batched_lora": check_batched_lora,
    "check_adapter_cache": check_adapter_cache,
    "check_combine": check_combine,
    "check_prefix_cache": check_prefix_cache,
}
"""Every exercise of the unit, by the name of its check."""
