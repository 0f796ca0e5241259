"""V0 whole: both models behind one interface, the reference architecture, several policies at once."""

from pathlib import Path

import numpy as np
import pytest
import torch
from random_tabpfn import write_tabpfn
from test_adapter import plain
from tiny_models import LettersEmbedder, tiny_embedder

from v05.errors import InputError
from v05.value.adapter import QueryAdapter, save_adapter
from v05.value.embedder import join
from v05.value.model import V0, Record

EASY = [f"compute {a}+{b}" for a in range(1, 9) for b in range(1, 6)]
HARD = [f"find all primes p such that p+{a} is {b} times a square" for a in range(2, 10) for b in range(5)]
CONTEXT = [*EASY[:24], *HARD[:24]]
SCORES = torch.tensor([0.8, 1.0, 0.6] * 8 + [-0.8, -1.0, -0.6] * 8)


@pytest.fixture
def model() -> V0:
    return V0.embedded(embedder=LettersEmbedder())


def test_predictions_follow_the_context(model: V0) -> None:
    found = model.predict(CONTEXT, SCORES, [EASY[30], HARD[30]])
    assert found[0] > 0.7 > 0.3 > found[1]
    turned = model.predict(CONTEXT, (1 - SCORES) / 2, [EASY[30], HARD[30]], reward_range=(0, 1))
    torch.testing.assert_close(turned, 1 - found, atol=1e-3, rtol=0)


def test_prompts_are_predicted_alike_alone_and_together(model: V0) -> None:
    conditioned = model.condition([Record(CONTEXT, SCORES)])
    together = conditioned.predict([*EASY[30:], *HARD[30:]])
    alone = torch.cat([conditioned.predict([prompt]) for prompt in [*EASY[30:], *HARD[30:]]])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    assert conditioned.predict([]).shape == (0,)


def test_policies_at_once_inform_each_other_and_background_does_so_too() -> None:
    records = [Record(CONTEXT, SCORES), Record([EASY[24], HARD[24], EASY[25]], torch.tensor([0.9, -0.5, 1.0]))]
    queries = [[EASY[30]], [EASY[31], HARD[31]]]
    model = V0.embedded(embedder=LettersEmbedder())
    both = model.predict_policies(records, queries)
    assert [len(part) for part in both] == [1, 2]
    backed = V0.embedded(records[:1], embedder=LettersEmbedder())
    found = backed.predict(records[1].prompts, records[1].outcomes, queries[1])
    torch.testing.assert_close(found, both[1], atol=1e-4, rtol=0)
    alone = model.predict(records[1].prompts, records[1].outcomes, queries[1])
    assert found[0] - found[1] > alone[0] - alone[1] + 0.1


def test_each_prompt_is_embedded_once() -> None:
    embedder = LettersEmbedder()
    model = V0.embedded(embedder=embedder)
    for _ in range(3):
        model.predict(CONTEXT, SCORES, [EASY[30], EASY[0], EASY[30]])
    assert sorted(embedder.asked) == sorted({*CONTEXT, EASY[30]})


def test_the_packaged_model_works_from_a_cache(tmp_path: Path) -> None:
    model = V0.embedded(cache=tmp_path / "cache.sqlite")
    first = model.predict(CONTEXT[::3], SCORES[::3], [EASY[30], HARD[30]])
    second = V0.embedded(cache=tmp_path / "cache.sqlite").predict(CONTEXT[::3], SCORES[::3], [EASY[30], HARD[30]])
    assert torch.equal(first, second)
    assert first[0] > 0.5 > first[1]


def test_from_pretrained_equals_the_plain_architecture(tmp_path: Path) -> None:
    """Backbone, adapter and TabPFN, each with random weights, one prompt after the other.

    TabPFN hashes its input into a feature, so its output is compared on features that are equal in every bit.
    """
    from tabpfn import TabPFNClassifier

    embedder = tiny_embedder(tmp_path / "qwen3")
    torch.manual_seed(0)
    adapter = QueryAdapter(embedder.width)
    torch.nn.init.normal_(adapter.generator[4].weight, std=0.3)
    save_adapter(adapter, tmp_path / "adapter.safetensors")
    head = write_tabpfn(tmp_path / "head.ckpt")
    known, prompts = CONTEXT[::6], [EASY[30], HARD[30], "1"]
    model = V0.from_pretrained(tmp_path / "adapter.safetensors", head, backbone=tmp_path / "qwen3")
    found = model.predict(known, SCORES[::6], prompts)
    for prompt in [*known, *prompts]:
        ids = torch.tensor([embedder.tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            states = embedder.model(input_ids=ids).last_hidden_state[0]
            expected = plain(adapter.eval(), join([states], embedder.width, 0))
        assert (model.describe([prompt]) - expected).abs().max() < 1e-5
    reference = TabPFNClassifier(
        n_estimators=4,
        model_path=str(head),
        device="cpu",
        random_state=0,
        ignore_pretraining_limits=True,
        inference_precision=torch.float32,
    )
    reference.fit(model.describe(known).numpy(), (SCORES[::6] >= 0).long().numpy())
    probability = [reference.predict_proba(model.describe([prompt]).numpy())[0, 1] for prompt in prompts]
    assert np.abs(found.numpy() - probability).max() < 1e-5
    assert np.std(probability) > 1e-4


def test_an_adapter_of_another_backbone_is_refused(tmp_path: Path) -> None:
    save_adapter(QueryAdapter(384, 4), tmp_path / "adapter.safetensors")
    with pytest.raises(InputError, match=r"adapter.safetensors wants a backbone of width 384, not"):
        V0.from_pretrained(tmp_path / "adapter.safetensors", backbone=tiny_embedder(tmp_path / "qwen3"))


def test_an_adapter_works_without_tabpfn(tmp_path: Path) -> None:
    embedder = tiny_embedder(tmp_path / "qwen3")
    save_adapter(QueryAdapter(embedder.width, 8), tmp_path / "adapter.safetensors")
    model = V0.from_pretrained(tmp_path / "adapter.safetensors", backbone=embedder, cache=tmp_path / "cache.sqlite")
    found = model.predict(CONTEXT, SCORES, [EASY[30], HARD[30]])
    assert ((found > 0) & (found < 1)).all()


def test_what_is_not_allowed_is_said(model: V0, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"entry 1 is 1.5; .*once \[-1, 1\] is mapped to \[0, 1\]"):
        model.predict(EASY[:2], [0.0, 2.0], EASY[:1])
    with pytest.raises(ValueError, match=r"shape \[1\]; allowed: one for each of 2 prompts"):
        model.predict(EASY[:2], [0.0], EASY[:1])
    with pytest.raises(ValueError, match="prompts has 2 lists; allowed: 1"):
        model.predict_policies([Record(CONTEXT, SCORES)], [[], []])
    with pytest.raises(InputError, match=r"absent\.pt: No such file"):
        V0.from_pretrained(tmp_path / "absent.pt", tmp_path / "absent.ckpt")


@pytest.mark.parametrize("solved", [slice(0, 1), slice(0, None, 2)], ids=["one of all", "every other one"])
def test_a_context_that_the_wording_explains_wholly_has_a_prediction(solved: slice) -> None:
    prompts = [f"What is the {what} of {n}?" for n in range(64) for what in ("square", "cube", "root", "log")]
    outcomes = torch.full((256,), -1.0)
    outcomes[solved] = 1.0
    found = V0.embedded(embedder=LettersEmbedder()).predict(prompts, outcomes, [*prompts, "What is the log of 99?"])
    assert found.isfinite().all()
    assert found[:-1][solved].mean() > found.mean()
