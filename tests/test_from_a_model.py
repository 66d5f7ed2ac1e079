"""The guide "From a Flax model to a pipeline and back": what it adds to a script, and that it trains the same."""

import difflib
import pathlib
import re

import jax
import pytest

PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "guides" / "from-a-model.md"
FENCES = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
LOOPS = [number for number, code in enumerate(FENCES) if "def step(" in code]
SCRIPTS = list(zip(LOOPS[::2], LOOPS[1::2], strict=True))
MOST_LINES = 10


def lines_of(code):
    return [line for line in code.splitlines() if line.strip()]


def test_there_is_a_script_for_nnx_and_one_for_linen():
    (_, nnx), (_, linen) = SCRIPTS
    assert "from_nnx(" in FENCES[nnx] and "from_linen(" in FENCES[linen]
    for _, piped in SCRIPTS:
        for part in ("make_mesh(pp=4, dp=2)", '"dualpipev"', "jnp.bfloat16", "adamw"):
            assert part in FENCES[piped]


@pytest.mark.parametrize(("plain", "piped"), SCRIPTS, ids=["nnx", "linen"])
def test_a_pipeline_takes_ten_lines_beside_the_plain_script(plain, piped):
    """Every line that the plain script does not have counts, changed ones too, and none is longer than 120 columns."""
    changes = list(difflib.ndiff(lines_of(FENCES[plain]), lines_of(FENCES[piped])))
    added = [line for line in changes if line.startswith("+ ")]
    assert 0 < len(added) <= MOST_LINES, "\n".join(added)
    assert max(map(len, added)) <= 122


@pytest.mark.slow
def test_both_scripts_train_as_the_plain_ones():
    """Without dropout and in float32, losses of all steps are equal up to rounding; the batch has padding."""
    names: dict[str, object] = {"losses": []}
    for code in FENCES:
        for old, new in (("Dropout(0.1", "Dropout(0.0"), ("bfloat16", "float32"), ("print(", "losses.append((")):
            code = code.replace(old, new)
        with jax.numpy_dtype_promotion("standard"):
            exec(re.sub(r"(losses\.append\(.*\))$", r"\1)", code, flags=re.MULTILINE), names)
    losses = [value for _, value in names["losses"]]
    for start in (0, 4):
        plain, piped = losses[start : start + 2], losses[start + 2 : start + 4]
        assert piped == pytest.approx(plain, rel=2e-5)
        assert piped[1] < piped[0]
