import pytest

from memlm.usage_errors import UsageError
from memlm.verb_parser import VerbParser, positive


@pytest.fixture
def parser():
    made = VerbParser("memlm verb", "What it does.\n  As it stands.")
    made.add_argument("model")
    made.add_argument("--max_new_tokens", type=positive, metavar="N")
    return made


def test_what_is_known(parser):
    parsed = parser.parse_args(["m", "--max_new_tokens", "3"])
    assert (parsed.model, parsed.max_new_tokens) == ("m", 3)
    assert "What it does.\n  As it stands." in parser.format_help()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["m", "--max-new-tokens", "3"],
            "--max-new-tokens 3: .* of memlm verb; did you mean --max_new_tokens?",
        ),
        (
            ["m", "--max_new_token=3"],
            "--max_new_token=3: is not an option of .* did you mean --max_new_tokens?",
        ),
        (["m", "--max"], "--max: is not an option of memlm verb$"),  # no abbreviations, and nothing near
        (["m", "n"], "n: is not an option of memlm verb$"),
        ([], "required: model"),
        (["m", "--max_new_tokens", "0"], "is 0, must be an integer of at least 1"),
        (["m", "--max_new_tokens", "1e3"], "is 1e3, must be an integer"),
    ],
)
def test_what_is_not(parser, words, message):
    with pytest.raises(UsageError, match=message):
        parser.parse_args(words)
