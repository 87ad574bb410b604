"""The patch file: read and written alike, readable, and strict with what it does not know."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deadcheck.errors import PatchError
from deadcheck.patch_file import dump_plan, parse_plan, read_plan
from deadcheck.patch_plan import Calls, Kind, PatchPlan, Place, Replacement, SiteChange, Units, layout_fault

PLAN = PatchPlan(
    Replacement(Kind.LEAKY, 0.01),
    (
        SiteChange("features.4", "relu", ("features.2",), modules=("features.4", "alias.4")),
        SiteChange(
            ":relu#2",
            "relu",
            ("fc",),
            module="net.0",
            calls=(
                Calls((Place("forward", 4, 0, "x = F.relu(self.fc(x))"),)),
                Calls((), (Place("forward", 9, 2, "'odd: # text'"),), (0, 2), 3),
            ),
            units=Units(32, ((0, 3), (7, 7)), "u32 . .", 4),
            alpha=0.2,
        ),
        SiteChange("3", "relu", operators=(1, 4)),
    ),
    others=True,
    clipped=True,
    call="encode",
    model={"path": "net.pt", "sha256": "ab"},
)


def test_what_is_written_is_read_back() -> None:
    assert parse_plan(dump_plan(PLAN)) == PLAN


def test_it_is_readable() -> None:
    text = dump_plan(PLAN)

    assert text.startswith("# A patch of deadcheck ")
    assert (
        "version: 1\nreplace:\n  with: leaky_relu\n  alpha: 0.01\nothers: true\nclipped: true\ncall: encode\n" in text
    )
    assert "- site: features.4\n  activation: relu\n  fed_by: [features.2]\n  modules: [features.4, alias.4]\n" in text
    assert "replaced: 0-3, 7\n" in text


def test_the_documents_show_one_that_is_read() -> None:
    page = (Path(__file__).parent.parent / "docs" / "patch.md").read_text()
    plan = parse_plan(page.partition("```yaml\n")[2].partition("```")[0])

    assert [change.site for change in plan.sites] == ["features.1", ":relu#2"]
    assert plan.sites[1].units == Units(64, ((3, 3), (17, 20)), "u64")


def test_a_line_that_ends_in_a_colon_stays_whole() -> None:
    assert str(Place("forward", 4, 0, "while F.relu(x).any():")) == "forward+4: while F.relu(x).any():"
    assert str(Place("forward", 4, 1, "")) == "forward+4.1"


places = st.builds(
    Place,
    st.from_regex(r"[A-Za-z_<][A-Za-z0-9_<>]{0,10}", fullmatch=True),
    st.integers(0, 500),
    st.integers(0, 9),
    st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=20).map(str.strip),
)


@given(
    st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=30),
    st.lists(places, max_size=3),
    st.floats(1e-8, 0.99),
)
def test_any_names_and_lines_survive(name: str, at: list[Place], alpha: float) -> None:
    change = SiteChange(name, "relu", (name,), modules=(name,), module=name, calls=(Calls(tuple(at)),), alpha=alpha)
    plan = PatchPlan(Replacement(Kind.ELU, alpha), (change,))

    assert parse_plan(dump_plan(plan)) == plan


GOOD = "version: 1\nreplace: {with: leaky_relu, alpha: 0.01}\n"
SITE = GOOD + "sites:\n- "


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file must hold names and values"),
        ("- 1", "the file must hold names and values"),
        ("version: 2\nreplace: {with: gelu}", "version 2 is not 1"),
        (GOOD + "sits: []", "the file: unknown key 'sits'"),
        (
            "version: 1\nreplace: {with: swish}",
            "replace.with is 'swish', not one of leaky_relu, prelu, elu, gelu, silu",
        ),
        ("version: 1\nreplace: {with: leaky_relu}", "alpha is None, not a number"),
        ("version: 1\nreplace: {with: leaky_relu, alpha: 1e-3}", "alpha is '1e-3', not a number; write it with a dot"),
        ("version: 1\nreplace: {with: leaky_relu, alpha: .nan}", "alpha is nan, not a number"),
        ("version: 1\nreplace: {with: leaky_relu, alpha: -3}", "alpha -3 would turn negative inputs into positive"),
        ("version: 1\nreplace: {with: leaky_relu, alpha: 0}", "alpha 0 is ReLU itself, so nothing would change; make"),
        ("version: 1\nreplace: {with: prelu, alpha: 1.0}", "alpha 1 lets negative inputs through whole"),
        ("version: 1\nreplace: {with: leaky_relu, alpha: 1.0e-300}", "alpha 1e-300 is no slope that float32 can hold"),
        ("version: 1\nreplace: {with: leaky_relu, alpha: true}", "alpha is True, not a number"),
        (GOOD + "others: yes please", "others is 'yes please', not true or false"),
        (GOOD + "version: 1", "a key stands twice; keep one"),
        (GOOD + "model: &a {path: *a}", "aliases (*name) are not allowed"),
        (
            GOOD + "sites: !!python/object:os.system []",
            "python/object:os.system is not allowed",
        ),
        (GOOD + "sites: [", "not a patch file"),
        (SITE + "{activation: relu}", "site is None, not text"),
        (SITE + "{site: a}", "site 'a' names no modules, calls or operators"),
        (SITE + "{site: a, modules: b}", "site 'a': modules is 'b', not a list"),
        (SITE + "{site: a, modules: [1]}", "site 'a': modules is 1, not text"),
        (SITE + "{site: a, calls: [{at: [forward]}]}", "'forward' is no place in code"),
        (SITE + "{site: a, operators: [-1]}", "site 'a': operators is -1, not a whole number"),
        (
            SITE + "{site: a, modules: [b], units: {of: 4, replaced: 2-9, layout: u4}}",
            "'2-9' is no range of units below 4",
        ),
        (SITE + "{site: a, modules: [b], units: {of: 4, replaced: 1, layout: u5}}", "'u5' does not hold 4 units"),
        (SITE + "{site: a, modules: [b], units: {of: 4, replaced: 1, layout: u4*p99999999}}", "larger than any layer"),
        (SITE + "{site: a, modules: [b], units: {of: 4, replaced: 1, layout: x}}", "'x' is no layout of units"),
    ],
)
def test_faults_are_named(text: str, message: str) -> None:
    with pytest.raises(PatchError) as fault:
        parse_plan(text, "net.patch.yaml")

    assert message in str(fault.value)
    assert str(fault.value).startswith("net.patch.yaml")


def test_a_deep_file_is_refused() -> None:
    with pytest.raises(PatchError, match="not a patch file"):
        parse_plan("[" * 5000)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PatchError, match="no such patch file"):
        read_plan(tmp_path / "none.yaml")
    with pytest.raises(PatchError, match="no such patch file"):
        read_plan(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PatchError, match="cannot be read as text"):
        read_plan(tmp_path / "binary")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(17 << 20)
    with pytest.raises(PatchError, match="larger than 16 MiB"):
        read_plan(tmp_path / "large")


@pytest.mark.parametrize(
    ("layout", "units", "is_good"),
    [("u4", 4, True), ("u2 . .", 2, True), ("u3*p9", 3, True), ("u3:4 . u4", 12, True), ("n*u3", 3, True),
     ("", 1, False), ("u4 ", 4, False), ("p4", 4, False), ("u4", 3, False), ("n*n*u3", 3, False)],
)  # fmt: skip
def test_layouts(layout: str, units: int, is_good: bool) -> None:
    assert (layout_fault(layout, units) is None) == is_good
