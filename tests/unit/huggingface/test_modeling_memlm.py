"""Exported models in transformers against ours: logits, generations, padding, losses."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from exported_models import ARCHITECTURES, STANDARD, greedy, trained

from memlm.huggingface.export import export
from memlm.memory.quantised import held_as

transformers = pytest.importorskip("transformers", reason="an oracle only, no dependency")

VARIED = ["memory plus", "ultramem", "peer", "engram"]
"""Of each kind of memory layer one."""


@pytest.fixture(scope="module", autouse=True)
def modules_of_its_own(tmp_path_factory):
    """transformers copies remote code into a cache, by default in the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("modules")
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(cache))
        yield


@pytest.fixture(scope="module")
def exported(tmp_path_factory, modules_of_its_own):
    """Gives an exported model as transformers loads it, each made once: tests leave it as it is."""

    @cache
    def made(name, values=None):
        return load(export(trained(name), tmp_path_factory.mktemp("out") / "model", values=values))

    return made


def load(folder, **options):
    model, notes = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options
    )
    assert not notes["missing_keys"] and not notes["unexpected_keys"] and not notes["mismatched_keys"]
    return model.eval()


def tokens_of(rows, length, seed=1):
    return torch.randint(257, (rows, length), generator=torch.Generator().manual_seed(seed))


def tolerance(name):
    # A sum that is rounded to bf16 may fall to the other side.
    return 5e-3 if "bf16" in name else 1e-4


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_and_generations_are_those_of_our_model(exported, name):
    ours, theirs = trained(name), exported(name)
    expected_class = STANDARD.get(name, "MemlmForCausalLM")
    assert type(theirs).__name__ == expected_class
    tokens = tokens_of(2, 100)
    with torch.no_grad():
        expected, found = ours.model(tokens), theirs(tokens).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance(name))
    prompt = tokens_of(1, 6, seed=2)[0].tolist()
    made = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=256
    )
    assert made[0, len(prompt) :].tolist() == greedy(ours.model, prompt, 40)


@pytest.mark.parametrize("name", [*VARIED, "moe sigmoid, shared, balanced"])
def test_a_prompt_padded_on_the_left_is_as_if_it_were_alone(exported, name):
    theirs = exported(name)
    prompts = [tokens_of(1, length, seed=length)[0].tolist() for length in (3, 11, 7)]
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 256}
    alone = [
        theirs.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist() for prompt in prompts
    ]
    padded = torch.tensor([[256] * (11 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (11 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    together = theirs.generate(padded, attention_mask=mask, **options)
    assert together[:, 11:].tolist() == alone


@pytest.mark.parametrize("name", ["memory plus", "engram", "peer"])
def test_logits_beside_padding_on_either_side(exported, name):
    theirs = exported(name)
    tokens = tokens_of(3, 20)
    mask = torch.ones(3, 20, dtype=torch.long)
    mask[0, :7], mask[1, 15:] = 0, 0
    with torch.no_grad():
        together = theirs(tokens, attention_mask=mask).logits
        for row in range(3):
            real = mask[row].bool()
            alone = theirs(tokens[row : row + 1, real]).logits[0]
            torch.testing.assert_close(together[row, real], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("past", [0, 3])
def test_every_position_attends_to_one_at_least(past):
    """Some devices give a position that attends to nothing no number, which spreads to all others."""
    from memlm.huggingface.modeling_memlm import attention_mask_of

    real = torch.randint(2, (50, past + 9), generator=torch.Generator().manual_seed(0)).bool()
    allowed = attention_mask_of(real, past, 9)
    assert allowed.shape == (50, 1, 9, past + 9) and allowed.any(-1).all()
    for row, (query, key) in ((row, place) for row in (0, 7) for place in ((0, 2), (4, 1), (8, 8), (2, 5))):
        expected = key == past + query or (key < past + query and bool(real[row, key]))
        assert bool(allowed[row, 0, query, key]) == expected


@pytest.mark.parametrize("name", ["memory plus", "engram", "moe sigmoid, shared, balanced"])
def test_beams_are_those_without_a_cache(exported, name):
    theirs = exported(name)
    prompt = tokens_of(2, 5)
    options = {
        "max_new_tokens": 12, "num_beams": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 256,
        "output_scores": True, "return_dict_in_generate": True,
    }  # fmt: skip
    cached, plain = (theirs.generate(prompt, use_cache=use, **options) for use in (True, False))
    assert cached.sequences.tolist() == plain.sequences.tolist()
    torch.testing.assert_close(cached.sequences_scores, plain.sequences_scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize("values_format", ["int8", "fp8"])
@pytest.mark.parametrize("name", VARIED)
def test_quantised_values(exported, name, values_format):
    ours, theirs = trained(name), exported(name, values_format)
    stored = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[values_format]
    assert all(pool.values.dtype == stored for pool in theirs.model.pools.values())
    for key in ours.model.pools:
        ours.model.pools[key] = held_as(ours.model.pools[key], values_format)
    tokens = tokens_of(2, 50)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours.model(tokens), rtol=0, atol=1e-4)
    prompt = tokens[0, :6].tolist()
    made = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=256
    )
    assert made[0, 6:].tolist() == greedy(ours.model, prompt, 40)


@pytest.mark.parametrize("name", ["memory plus", "engram", "peer", "moe expert choice"])
def test_bfloat16_keeps_the_tables_as_they_were_saved(tmp_path, name):
    ours = trained(name)
    theirs = load(export(ours, tmp_path / "out", dtype="bfloat16"), dtype="auto")
    assert theirs.model.embedding.weight.dtype == torch.bfloat16
    assert all(pool.values.dtype == torch.float32 for pool in theirs.model.pools.values())
    pools, ours.model.pools = ours.model.pools, torch.nn.ModuleDict()
    ours.model.to(torch.bfloat16)
    ours.model.pools = pools
    tokens = tokens_of(2, 50)
    with torch.no_grad():
        expected, found = ours.model(tokens).float(), theirs(tokens).logits.float()
    # The same computation, rounded in another order: rows chosen by nearly equal scores may differ.
    assert (found - expected).square().mean().sqrt() < 0.2 * expected.std()


def test_the_loss_is_the_mean_over_the_next_tokens(exported):
    theirs = exported("memory plus")
    tokens = tokens_of(2, 9)
    labels = tokens.clone()
    labels[0, :4] = -100
    output = theirs(tokens, labels=labels)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    in_all = theirs(tokens, labels=labels, num_items_in_batch=26)
    torch.testing.assert_close(in_all.loss, expected * 13 / 26)
    output.loss.backward()
    assert theirs.model.pools["a"].values.grad.abs().sum() > 0
    theirs.zero_grad()


def test_tokens_in_pieces_and_the_last_logits_alone(exported):
    theirs = exported("engram")
    tokens = tokens_of(2, 30)
    with torch.no_grad():
        whole = theirs(tokens, output_hidden_states=True)
        first = theirs(tokens[:, :11])
        cache = getattr(first, "cache", None) or first.past_key_values
        rest = theirs(tokens[:, 11:], past_key_values=cache, logits_to_keep=3)
    torch.testing.assert_close(rest.logits, whole.logits[:, -3:], rtol=0, atol=1e-5)
    assert len(whole.hidden_states) == 4
    torch.testing.assert_close(theirs.model.output(whole.hidden_states[-1]), whole.logits)


def test_what_it_cannot_do_is_said(exported):
    theirs = exported("memory plus")
    tokens = tokens_of(1, 5)
    with pytest.raises(ValueError, match="inputs_embeds is not supported"):
        theirs(tokens, inputs_embeds=torch.zeros(1, 5, 32))
    with pytest.raises(ValueError, match="static caches"):
        theirs.generate(tokens, cache_implementation="static", max_new_tokens=3)
    with pytest.raises(ValueError, match="values_format is 'int4'; expected one of float32"):
        type(theirs.config)(values_format="int4")


def test_saved_by_transformers_and_loaded_again(exported, tmp_path):
    theirs = exported("memory in every block", "int8")
    theirs.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    tokens = tokens_of(1, 20)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, theirs(tokens).logits)
