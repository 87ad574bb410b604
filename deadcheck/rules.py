"""The rules of the gate: a stable code, a name, and a page for each."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from deadcheck.errors import UsageError

VERSION = 1
"""Raised when a rule or a verdict changes its meaning; reports of different versions are not compared."""


@dataclass(frozen=True)
class Rule:
    """One rule, as its page tells it."""

    code: str
    """Stable: ``DC001`` …; never used again for something else."""

    name: str
    summary: str
    """When it speaks, in one sentence."""

    default: str
    """What it does when nothing is set."""

    why: str
    fix: str
    settings: str
    """How to change it."""

    adjustable: bool = True
    """Whether a policy may set its level; the others say that nothing can be judged."""


RULES: tuple[Rule, ...] = (
    Rule(
        code="DC001",
        name="layer-mostly-dead",
        summary="A layer has more dead units than allowed.",
        default="Warns from 25 % of a layer on; never fails until max_layer_dead is set.",
        why=(
            "Dead units are capacity that is paid for and not used. Death is not illness by itself, though: networks "
            "that work at 98.9 % accuracy were measured with 43 to 58 % of a wide layer dead. So no limit is set for "
            "you, and one below 90 % should come from a checkpoint that you know to be good. Silent units (never on, "
            "in too few samples to call them dead) count as dead here, since the share can only fall as samples are "
            "added."
        ),
        fix=(
            "Compare with an earlier checkpoint (--baseline). If the share grew, look at the learning rate and at the "
            "layer's biases; if it never moved, a smaller layer does the same work."
        ),
        settings=(
            "policy.max_layer_dead (--max-layer-dead), for some layers under policy.layers; "
            "thresholds.warn_layer_dead for the warning."
        ),
    ),
    Rule(
        code="DC002",
        name="model-mostly-dead",
        summary="The whole model has more dead units than allowed.",
        default="Off until max_model_dead is set.",
        why=(
            "One number for a dashboard. It weighs a wide layer more than a narrow one, so a dead bottleneck may hide "
            "in it: set DC001 or compare with a baseline as well."
        ),
        fix="As for DC001, beginning with the layer that has the largest share.",
        settings="policy.max_model_dead (--max-model-dead).",
    ),
    Rule(
        code="DC003",
        name="layer-dead",
        summary="No unit of a layer ever fired.",
        default="Fails.",
        why=(
            "Nothing passes the layer, and no gradient passes it back: what comes before it no longer learns, and "
            "what comes after it sees a constant. In a residual block the network may survive, without that block."
        ),
        fix=(
            "Check first that the data is prepared as in training. Then go back to the last checkpoint in which the "
            "layer lived, and lower the learning rate, or warm it up; or initialise the layer anew."
        ),
        settings="policy.rules: {layer-dead: warn}, or policy.layers for one layer.",
    ),
    Rule(
        code="DC004",
        name="output-constant",
        summary="The model gave the same output for every sample.",
        default="Fails.",
        why=("Whatever it is asked, it gives one answer: a layer died on the way, or the inputs never reach it."),
        fix="Look at the first layer in which no unit fires, and at the range of the inputs in the report.",
        settings="policy.rules: {output-constant: warn}.",
    ),
    Rule(
        code="DC005",
        name="invalid",
        summary="A unit gave NaN or infinity.",
        default="Fails.",
        why=(
            "One such value makes everything after it meaningless, and such a unit is neither dead nor alive. A "
            "single sample is proof enough."
        ),
        fix=(
            "Look at the first layer that is named: its weights (a diverged step), its inputs, its type (float16 "
            "overflows at 65,504)."
        ),
        settings="policy.rules: {invalid: warn}.",
    ),
    Rule(
        code="DC006",
        name="explosion",
        summary="Activations grow too much from the first layer to another.",
        default="Warns above a growth of 1,000.",
        why=(
            "The largest |h| of a layer is more than a thousand times the first layer's. Such activations overflow in "
            "half precision, and their gradients throw units over the edge."
        ),
        fix="Normalisation, a smaller learning rate, gradient clipping, or a smaller initial scale.",
        settings="thresholds.explosion_growth; policy.rules: {explosion: error}.",
    ),
    Rule(
        code="DC007",
        name="worse-than-baseline",
        summary="A larger share of a layer is dead than in the baseline, by more than the slack.",
        default="Fails above 5 points, when a baseline is given.",
        why=(
            "The ratchet. A limit that fits every layer lets a slow decline through; a baseline catches it in the "
            "layer in which it happens. Shares are compared, so it also fits a model of the same architecture that "
            "was trained anew (compare: rates)."
        ),
        fix=(
            "deadcheck diff OLD NEW shows the change of every layer. If the new state is wanted, write it down: "
            "deadcheck baseline write --accept-worse."
        ),
        settings="policy.max_worse (--max-worse), 0% for a ratchet that never gives; policy.compare.",
    ),
    Rule(
        code="DC008",
        name="newly-dead",
        summary="Units that fired in the baseline never fire now.",
        default="Fails above 5 % of a layer, when a baseline of the same lineage is given.",
        why=(
            "Unit by unit, against an earlier checkpoint of the same training. It sees what shares hide: twenty units "
            "that died while twenty others came back."
        ),
        fix=(
            "The report lists the units. Look at what happened between the two checkpoints: the learning rate, the "
            "data, a layer that was unfrozen."
        ),
        settings=(
            "policy.max_new_dead (--max-new-dead); compare: rates where unit numbers mean nothing across the two "
            "models."
        ),
    ),
    Rule(
        code="DC009",
        name="saturated",
        summary="Units of sigmoid, tanh, ReLU6 … sit on a rail in every observation.",
        default="Warns from 25 % of a layer on.",
        why=(
            "On a rail the slope is 0, so no gradient passes: such a unit is as stuck as a dead one, with another "
            "value."
        ),
        fix="Smaller weights or inputs, normalisation before the activation, a smaller learning rate.",
        settings="policy.rules: {saturated: error}; thresholds.warn_layer_dead.",
    ),
    Rule(
        code="DC010",
        name="too-few-samples",
        summary="The scan saw too few samples to judge.",
        default="Exit code 3 below 299 samples.",
        why=(
            "A unit that fires in 1 % of the samples is missed by 100 samples in 37 % of the cases. 299 samples "
            "without firing bound the rate below 1 %, with 95 % confidence. Below that a gate neither passes nor "
            "fails, unless a rule fails on evidence that needs no more samples (DC005)."
        ),
        fix="Give more data. Where a layer's samples cannot be told apart, --batch-size 1 makes each count.",
        settings="policy.min_samples (--min-samples); thresholds.p_dead and delta set what it takes by default.",
        adjustable=False,
    ),
    Rule(
        code="DC011",
        name="never-ran",
        summary="A part of the model never ran on this data.",
        default="Warns; fails when the baseline measured it.",
        why=(
            "What did not run was not measured, and not measured is not healthy: a router that no longer sends "
            "anything to an expert has lost it as surely as a layer of dead units."
        ),
        fix=("Give data that reaches it, or say that it is meant so: policy.layers with level off, or an ignore."),
        settings="policy.rules: {never-ran: error}.",
    ),
    Rule(
        code="DC012",
        name="synthetic-data",
        summary="The data is random numbers.",
        default="Exit code 3.",
        why=(
            "What is dead on noise says nothing about real data: on one small trained net 5,000 real samples showed "
            "63 and 47 dead units of 256, and 5,000 random ones none."
        ),
        fix="Give a few hundred real samples, prepared as in training.",
        settings="None: random data cannot pass a gate.",
        adjustable=False,
    ),
    Rule(
        code="DC013",
        name="unused-ignore",
        summary="An ignore fits no finding any more, has expired, or a layer pattern matches no layer.",
        default="Warns.",
        why="An exception that outlives its reason hides the next fault.",
        fix="Delete it, or give it a new date and a new reason.",
        settings="policy.rules: {unused-ignore: off}.",
    ),
    Rule(
        code="DC014",
        name="negative-only",
        summary="With the units that never leave the negative side counted as dead, a limit is broken.",
        default="Fails where DC001, DC002, DC003, DC007 or DC008 would; warns from 25 % of a layer on.",
        why=(
            "A LeakyReLU gives no zeros, so a model whose dead ReLUs were replaced looks healed to every tool that "
            "counts zeros. The units are where they were: their input is never above 0, and only the leak comes "
            "through."
        ),
        fix=(
            "If the slope is there to revive them, train on and watch them leave; until then say so with an ignore "
            "that expires. If they never do, revive or prune them."
        ),
        settings="policy.rules: {negative-only: warn}; the limits are those of the rules it stands in for.",
    ),
    Rule(
        code="DC015",
        name="baseline-not-comparable",
        summary="The baseline cannot be compared with this scan.",
        default="Exit code 3.",
        why=(
            "Another architecture, other data, another number of samples or another version of the rules: a "
            "difference would say nothing about the model."
        ),
        fix=(
            "Write the baseline again from a checkpoint that is known to be good, on the same data: deadcheck "
            "baseline write."
        ),
        settings="None.",
        adjustable=False,
    ),
    Rule(
        code="DC016",
        name="nothing-judged",
        summary="No layer was judged.",
        default="Exit code 3.",
        why=(
            "The scan measured no activation, or the policy turned every layer off. A gate that looked at nothing "
            "must not pass."
        ),
        fix="Check that this is the model you meant, and the patterns of policy.layers.",
        settings="None.",
        adjustable=False,
    ),
)

BY_NAME = {rule.name: rule for rule in RULES}


def find_rule(name: str) -> Rule:
    """Return the rule with this code or name; UsageError offers the nearest."""
    for rule in RULES:
        if name.upper() == rule.code or name.lower() == rule.name:
            return rule
    names = [part for rule in RULES for part in (rule.code, rule.name)]
    near = difflib.get_close_matches(name, names, 1) or difflib.get_close_matches(name.upper(), names, 1)
    hint = f"did you mean {near[0]}?" if near else f"there are {RULES[0].code} to {RULES[-1].code}"
    raise UsageError(f"there is no rule {name!r}; {hint}")


def page(rule: Rule) -> str:
    """Return a rule's page as Markdown."""
    default = rule.default[0].lower() + rule.default[1:]
    parts = (
        f"## {rule.code} {rule.name}",
        rule.summary,
        f"**By default** {default}",
        f"**Why.** {rule.why}",
        f"**What to do.** {rule.fix}",
        f"**Settings.** {rule.settings}",
    )
    return "\n\n".join(parts) + "\n"


def pages() -> str:
    """Return docs/rules.md."""
    rows = "".join(f"| {rule.code} | {rule.name} | {rule.summary} | {rule.default} |\n" for rule in RULES)
    return f"{_HEAD}{rows}\n" + "\n".join(page(rule) for rule in RULES)


_HEAD = """# Rules

What `deadcheck gate` judges. A rule is named by its code or its name, in a policy, in an ignore and in
`deadcheck rule DC003`, which prints its page. A share at its limit is allowed, one above it is not; a warning begins at
its share. Counts are compared as whole numbers, never rounded. An ignore silences the rule that it names, and no other.

This page is written from `deadcheck/rules.py` by
`python -c "from deadcheck.rules import pages; print(pages(), end='')" > docs/rules.md`.

| code | name | speaks when | by default |
|---|---|---|---|
"""
