import pytest
from inspected_models import KINDS, make, random_tokens

from memlm.inspection.ablation import ablate
from memlm.inspection.corpus import Context
from memlm.inspection.picture import draw_ablation, draw_reads
from memlm.inspection.reads import reads_of
from memlm.inspection.text import ablation_text, reads_text, surroundings, token_label, visible
from memlm.tokenizers import load_tokenizer

BYTES = load_tokenizer("bytes")


@pytest.mark.parametrize("kind", KINDS)
def test_tables_fit_the_terminal_and_name_every_head(kind):
    tokens = random_tokens(5)
    layers = reads_of(make(kind), tokens)
    labels = ["<eos>", " a token that is much too long", "b", "\\n", "c"]
    for width in (60, 80, 132):
        text = reads_text(layers, labels, top=3, last=None, width=width)
        assert max(map(len, text.splitlines())) <= width
        overview, *details = text.split("\n\nBlock ")
        assert len(details) == len(layers)
        for layer, section in zip(layers, details, strict=True):
            assert section.startswith(f"{layer.place.block}, pool {layer.place.pool} ")
            heads = layer.place.short_heads
            if layer.place.by_ngrams:
                assert f"b{layer.place.block}" in overview.split()
                assert f"{heads[0]} {layer.rows[0, 0, 0]}:{layer.weights[0, 0, 0]:.3f}" in section
                continue
            for head, name in enumerate(heads):
                assert f"b{layer.place.block}.{name}" in overview.split()
                best = layer.factors[4, head].abs().argmax()
                virtual = f"@{layer.tables[4, head, best]}" if "expanded" in kind else ""
                cell = f"{layer.rows[4, head, best]}{virtual}:{layer.weights[4, head, best]:.2f}"
                line = section.splitlines()[head - len(heads)]
                assert line.split(name + " ", 1)[1].strip().startswith(cell)


def test_only_the_last_tokens():
    layers = reads_of(make("memory"), random_tokens(5))
    text = reads_text(layers, list("abcde"), top=2, last=2, width=100)
    details = text.split("\n\nBlock ")[1].splitlines()[1:]
    assert [line.split()[:2] for line in details[::2]] == [["3", "d"], ["4", "e"]]
    assert reads_text(layers, list("abcde"), 2, 99, 100) == reads_text(layers, list("abcde"), 2, None, 100)


def test_tokens_on_one_line():
    assert token_label(BYTES, BYTES.eos_id) == "<eos>"
    assert token_label(BYTES, ord("\n")) == "\\n"
    assert visible("a\tb\u2028c é字") == "a\\tb\\u2028c é字"


@pytest.mark.parametrize("width", [24, 40, 200])
def test_surroundings(width):
    text = "one two three four five six seven eight nine ten"
    ids = [BYTES.eos_id, *BYTES.encode(text)]
    for position in (0, 1, 20, len(ids) - 1):
        shown = surroundings(Context(0, ids, position, 0, 0, 0.5), BYTES, width)
        assert len(shown) <= width
        assert f"[{token_label(BYTES, ids[position])}]" in shown
        before, after = shown.split("[")[0].lstrip("…"), shown.split("]")[1].rstrip("…")
        place = max(position - 1, 0)
        assert text[:place].endswith(before)
        assert text[place + (position > 0) :].startswith(after)
        if width == 200:
            assert shown.replace("[<eos>]", "").replace("[", "").replace("]", "") == text


def test_half_a_character():
    ids = [BYTES.eos_id, *BYTES.encode("aéb")]
    shown = surroundings(Context(0, ids, 2, 0, 0, 0.5), BYTES, 60)
    assert shown.startswith("a[")
    assert shown.endswith("b")


@pytest.mark.filterwarnings("error")
def test_ablations_as_a_table_and_pictures(tmp_path):
    for kind in ("several_pools", "engram"):
        model, prompt = make(kind), random_tokens(6)
        report = ablate(model, prompt, [3, 4], 20, remove=2)
        lines = ablation_text(report, ["x", "y"]).splitlines()
        assert lines[0].startswith(
            f"Answer [x] [y], 2 tokens: log-likelihood {report.intact.log_likelihood:.4f} nats"
        )
        rows = lines[-len(report.ablations) :]
        for row, ablation in zip(rows, report.ablations, strict=True):
            change = ablation.scored.log_likelihood - report.intact.log_likelihood
            assert f"{change:+.4f}" in row
        assert rows[0].startswith(f"block {report.ablations[0].block}, all heads")
        assert ("2-gram 0" if kind == "engram" else "head 0") in rows[1]
        assert rows[-1].startswith("these slots together")
        for draw, drawn in (
            (draw_ablation, [report]),
            (draw_reads, [reads_of(model, prompt), ["$a$", "_^", "字", *"def"]]),
        ):
            path = tmp_path / "made" / f"{draw.__name__}.png"
            draw(*drawn, path)
            assert path.read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (tmp_path / "made").iterdir()) == ["draw_ablation.png", "draw_reads.png"]
