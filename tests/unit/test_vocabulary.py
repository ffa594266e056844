"""Which tokens end a response, and which the model has: tokenizer, config.json and generation_config.json compared."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from megarl import refusals
from megarl.config import Config, load_config
from megarl.data import demonstrations_of, load_tokenizer, prompts_of, vocabulary_of
from megarl.data.prompts import check_rows
from megarl.errors import UserError
from megarl.loop.sampler import Sampler
from megarl.loop.scoring import RewardScorer
from megarl.refusals import files
from tools.tiny_model import make_tokenizer

EOS, EQUALS, TWO = 1, 13, 5  # ids of <eos>, "=", "2"
TURNS = "{% for m in messages %}{{ '<x0>' if m.role == 'user' else '<x1>' }}{{ m.content }}{% endfor %}"
TURNS += "{% if add_generation_prompt %}{{ '<x1>' }}{% endif %}"  # GLM's way: a turn ends where the next one begins
USER, SAYS, CALL = 24, 25, 26  # <x0>, <x1>, <x2>


@pytest.fixture
def folder(run_yaml: Path) -> Path:
    return run_yaml.parent / "model"


def save(folder: Path, tokenizer: Any, config: dict[str, Any] = {}, generation: dict[str, Any] | None = None) -> None:
    tokenizer.save_pretrained(folder)
    tree = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(tree))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))


def special(tokenizer: Any) -> Any:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<x0>", "<x1>"]})
    return tokenizer


def of(run_yaml: Path, *overrides: str, rows: list[dict[str, Any]] | None = None) -> Config:
    if rows is not None:
        (run_yaml.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = run_yaml.parent / "rows.jsonl"
    return load_config(run_yaml, [f"data.prompts={data}", f"sft.data={data}", *overrides])


def test_fault_04_every_eos_of_the_folder_ends_a_response_and_sft_learns_the_turns_own(
    run_yaml: Path, folder: Path
) -> None:
    """GLM-4.5: the turn ends where <|user|> begins, which generation_config.json lists and the tokenizer does not."""
    tokenizer = special(make_tokenizer())
    tokenizer.chat_template = TURNS
    save(folder, tokenizer, {"eos_token_id": 2}, {"eos_token_id": [EOS, USER, 30]})
    config = of(run_yaml, "rollout.stop_token_ids=[13, 30]", rows=[{"prompt": "1+1", "response": "2"}] * 2)
    loaded = load_tokenizer(config.model)
    assert vocabulary_of(config, loaded).ends == (USER, EOS, 30, EQUALS)
    [(tokens, length), _] = demonstrations_of(config, loaded)
    assert loaded.decode(tokens[:length]) == "<x0>1+1<x1>" and tokens[length:] == [TWO, USER]
    (folder / "generation_config.json").unlink()
    config = of(run_yaml, rows=[{"prompt": "1", "response": "2<eos>"}])
    assert vocabulary_of(config, loaded).ends == (EOS, 2)
    [(tokens, length)] = demonstrations_of(config, loaded)
    assert tokens[length:] == [TWO, EOS], "an eos that is there is not doubled"


def test_fault_04_rollout_and_reward_know_the_same_ends(run_yaml: Path, folder: Path) -> None:
    save(folder, make_tokenizer(), {}, {"eos_token_id": [EOS, 20]})
    config = of(run_yaml, "rollout.stop_token_ids=[13]", "data.reward=exact_match")

    class Engine:
        class model:
            parallel = None

            class weight_map:
                moe_layers: list[int] = []

    tokenizer = load_tokenizer(config.model)
    assert Sampler(config, Engine, None, tokenizer).stop_token_ids == [EOS, 20, EQUALS]  # type: ignore[arg-type]
    texts = RewardScorer(config, tokenizer, fetches=False)._texts
    for end, truncated, wanted in ((EQUALS, False, "2"), (EQUALS, True, "2="), (EOS, False, "2")):
        given = texts.input([TWO, TWO, end], 1, "2", "2", {}, truncated)
        assert given.response == wanted and given.tokens == [TWO, end]


@pytest.mark.parametrize("command", ["run", "train", "sft", "compare", "generate"])
def test_fault_04_a_model_that_nothing_ends_is_refused(run_yaml: Path, folder: Path, command: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    save(folder, tokenizer, {"eos_token_id": None}, {"bos_token_id": 2})
    at = "launch.store=127.0.0.1:0" if command != "train" else "launch.store=127.0.0.1:29611"
    rows = [{"prompt": "1", "answer": "1", "response": "1"}]
    said = "neither its tokenizer nor generation_config.json nor config.json names an eos token"
    with pytest.raises(UserError, match=f"{said}, so no response would end; give rollout.stop_token_ids"):
        refusals.check(of(run_yaml, at, rows=rows), command)
    refusals.check(of(run_yaml, at, "rollout.stop_token_ids=[1]"), command)
    with pytest.raises(UserError, match=r"rollout.stop_token_ids \[1, 32\]: 32 is not below the model's vocab_size 32"):
        refusals.check(of(run_yaml, at, "rollout.stop_token_ids=[1, 32]"), command)
    (folder / "generation_config.json").write_text('{"eos_token_id": 99}')
    with pytest.raises(UserError, match=rf"{said} \(99 are not below vocab_size 32\)"):
        refusals.check(of(run_yaml, at), command)
    refusals.check(of(run_yaml), "score")  # token ids in, numbers out


@pytest.mark.parametrize(("command", "row"), [("sft", {"response": "2<call>"}), ("run", {"prompt": "<call>1"})])
def test_fault_04_a_token_that_the_model_has_not_is_refused(
    run_yaml: Path, folder: Path, command: str, row: dict[str, str]
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<call>"])
    save(folder, tokenizer)
    good = {"prompt": "1", "answer": "1", "response": "1"}
    config = of(run_yaml, rows=[good, good | row])
    said = (
        r"rows.jsonl line 2: token 32 of the tokenizer \(.*<call>.*\) is not below config.json's vocab_size 32; resize"
    )
    with pytest.raises(UserError, match=said):
        refusals.check(config, command)
    loaded = load_tokenizer(config.model)
    with pytest.raises(UserError, match=said):
        [*demonstrations_of(config, loaded)] if command == "sft" else prompts_of(config, config.data.prompts, loaded)
    refusals.check(of(run_yaml, rows=[good]), command)  # a token that is never used does no harm


def test_thoughts_of_earlier_turns_that_the_template_removes_are_not_measured(run_yaml: Path, folder: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content.split('=')[-1] }}{% endfor %}"
    save(folder, tokenizer)
    turns = [("user", "1"), ("assistant", "1" * 200 + "=2"), ("user", "3")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns], "answer": "3"}
    config = of(run_yaml, "rollout.max_prompt_tokens=9", rows=[row])
    check_rows(config, config.data.prompts, "prompts")
    [prompt], _ = prompts_of(config, config.data.prompts, load_tokenizer(config.model))
    assert prompt.text == "123"
    row["messages"][2]["content"] *= 10
    config = of(run_yaml, "rollout.max_prompt_tokens=9", rows=[row])
    with pytest.raises(UserError, match="line 1: 10 tokens are more than rollout.max_prompt_tokens 9"):
        check_rows(config, config.data.prompts, "prompts")


def test_only_what_is_trained_on_must_have_the_named_columns(run_yaml: Path) -> None:
    """One CONFIG is for all commands, whose rows may be of other shapes."""
    config = of(run_yaml, "data.columns={answer: glod}", rows=[{"prompt": "1", "answer": "2"}])
    for command in ("eval", "generate", "compare"):
        case = SimpleNamespace(config=config, command=command)
        assert files.prompts(case) is None  # type: ignore[arg-type]
    with pytest.raises(UserError, match="data.columns names 'glod' for the answer, which no row of "):
        files.prompts(SimpleNamespace(config=config, command="run"))  # type: ignore[arg-type]


def test_fault_04_a_prompt_does_not_end_with_an_eos(run_yaml: Path, folder: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", EOS)])
    save(folder, tokenizer)
    config = of(run_yaml, rows=[{"prompt": "1=", "answer": "1"}])
    [prompt], _ = prompts_of(config, config.data.prompts, load_tokenizer(config.model))
    assert prompt.tokens == [4, EQUALS], "what a post-processor appends is taken off"
    config = of(run_yaml, rows=[{"prompt": "1<eos>", "answer": "1"}])
    with pytest.raises(UserError, match="line 1: key 'prompt' ends with '<eos>', which ends a response; take it off"):
        prompts_of(config, config.data.prompts, load_tokenizer(config.model))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<eos>{% endfor %}"
    save(folder, tokenizer)
    config = of(run_yaml, rows=[{"prompt": "1", "answer": "1"}])
    [prompt], _ = prompts_of(config, config.data.prompts, load_tokenizer(config.model))
    assert prompt.tokens == [4, EOS], "a chat template knows what it does"


def test_fault_15_a_tokenizer_that_is_a_program(run_yaml: Path, folder: Path) -> None:
    """Moonlight's and Kimi's folder: auto_map, tiktoken.model, no tokenizer.json."""
    (folder / "tokenizer.json").unlink()
    (folder / "tiktoken.model").write_text("")
    settings = {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}, "tokenizer_class": "Own"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenization_own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\nfrom tools.tiny_model import character_tokenizer\n"
        "class Own(PreTrainedTokenizerFast):\n    def __init__(self, **kwargs):\n"
        "        super().__init__(tokenizer_object=character_tokenizer(), eos_token='<eos>')\n"
    )
    said = (
        r"its tokenizer is a program in that folder, tokenization_own.Own \(auto_map in tokenizer_config.json\); read "
    )
    said += "it, then set model.trust_remote_code=true, or save a tokenizer.json"
    rows = [{"prompt": "1=", "answer": "1", "response": "1"}]
    for command in ("run", "sft", "generate"):
        with pytest.raises(UserError, match=said):
            refusals.check(of(run_yaml, rows=rows), command)
    config = of(run_yaml, "model.trust_remote_code=true")
    refusals.check(config, "sft")
    assert load_tokenizer(config.model).encode("1=") == [4, EQUALS]


def test_a_tokenizer_that_cannot_be_read(run_yaml: Path, folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer.json' cannot be read .*; copy it again"):
        refusals.check(load_config(run_yaml))
