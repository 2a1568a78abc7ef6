"""Which parameter belongs to which optimizer group: ordered rules, the first match wins."""

import re
from collections.abc import Iterable, Sequence

from torch import nn

Rule = tuple[str, str]
"""A regular expression searched in the parameter's name, and the group it assigns."""

RULES: tuple[Rule, ...] = (
    # Rows of a pool: their own rate, schedule, decay and clip, and a sparse update.
    (r"(^|\.)pools\.\w+\.values$", "values"),
    # Decay pulls towards zero, which is no neutral value for gains, biases and keys; embedding rows
    # of rare tokens would shrink in every step that does not train them.
    (r"norm|bias$|qk_gain$|product_keys\.(keys|core)$|embedding\.weight$", "no_decay"),
    (r"", "decay"),
)


def assign(
    named_parameters: Iterable[tuple[str, nn.Parameter]], rules: Sequence[Rule] = RULES
) -> dict[str, list[nn.Parameter]]:
    """Assign every trainable parameter to a group.

    Args:
        named_parameters: As ``Module.named_parameters()`` gives them.
        rules: Tried in order; the first whose pattern is found in the name decides.

    Returns:
        Group name -> its parameters, groups in the order of the rules, empty ones left out.

    Raises:
        ValueError: A parameter matches no rule.
    """
    groups: dict[str, list[nn.Parameter]] = {group: [] for _, group in rules}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        group = next((group for pattern, group in rules if re.search(pattern, name)), None)
        if group is None:
            raise ValueError(f"parameter {name} matches no optimizer rule")
        groups[group].append(parameter)
    return {group: parameters for group, parameters in groups.items() if parameters}
