"""Prompts and demonstrations from JSONL: what is read, and what a user reads about a bad line."""

from __future__ import annotations

import gzip
import json
import random
import sys
import tracemalloc
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
import pytest

from megarl.data import KeptPrompts, Prompt, PromptStream, load_demonstrations, load_prompts
from megarl.data.shapes import Columns, Kind, Unseen
from megarl.errors import UserError
from megarl.reward import answer_fault
from tools.tiny_model import make_tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m.content == '13' %}{{ raise_exception('unlucky') }}{% endif %}{{ m.role[0] + ':' "
    "+ m.content + '\n' }}"
)
TEMPLATE += "{% endfor %}{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def chat():
    made = make_tokenizer()
    made.chat_template = TEMPLATE
    return made


def write(folder: Path, *lines: str | bytes | dict) -> Path:
    path = folder / "rows.jsonl"
    raw = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in raw))
    return path


def test_plain_prompts(tmp_path: Path, tokenizer) -> None:
    path = write(
        tmp_path, {"prompt": "12=", "answer": "3"}, "", {"prompt": "405=", "answer": 9, "source": "extra keys are fine"}
    )
    prompts, bad = load_prompts(path, tokenizer, max_tokens=4, on_bad_line="error")
    assert bad == 0
    assert [(p.text, p.answer, p.line) for p in prompts] == [("12=", "3", 1), ("405=", "9", 3)]
    assert [tokenizer.decode(p.tokens) for p in prompts] == ["12=", "405="]
    assert [len(p.tokens) for p in prompts] == [3, 4]


def test_chat_template(tmp_path: Path, chat) -> None:
    messages = [{"role": "system", "content": "1"}, {"role": "user", "content": "2"}]
    path = write(tmp_path, {"messages": messages, "answer": "3"}, {"prompt": "4", "answer": "5"})
    prompts, _ = load_prompts(path, chat, max_tokens=64, on_bad_line="error")
    assert [p.text for p in prompts] == ["s:1\nu:2\na:", "u:4\na:"]
    assert len(prompts[0].tokens) == len(prompts[0].text)


def test_an_integer_that_a_table_holds_as_a_float_is_read_as_one(tmp_path: Path, tokenizer) -> None:
    rows = [{"prompt": "1=", "answer": answer} for answer in (24.0, 1e22, -0.0, 0.5)]
    prompts, _ = load_prompts(write(tmp_path, *rows), tokenizer, max_tokens=9, on_bad_line="error")
    assert [p.answer for p in prompts] == ["24", "1" + "0" * 22, "0", "0.5"]


def test_a_blank_answer_is_a_bad_row_or_none(tmp_path: Path, tokenizer) -> None:
    path = write(tmp_path, {"prompt": "1=", "answer": "1"}, {"prompt": "2=", "answer": ""})
    how = dict(max_tokens=9, on_bad_line="error", fault_of_answer=partial(answer_fault, "exact_match"))
    with pytest.raises(UserError, match="line 2: answer '', from 'answer': is blank; give the answer"):
        load_prompts(path, tokenizer, **how)
    prompts, _ = load_prompts(path, tokenizer, needs_answer=False, **how)
    assert [p.has_answer for p in prompts] == [True, False]


BAD = [
    ('{"prompt": "1=", "answer"', "not JSON (Expecting ':' delimiter at column 26)"),
    ("[1]", "holds a list"),
    ("[", "begins a list; write one row"),
    (b'{"prompt": "\xff"}', "not UTF-8 at byte 12"),
    ('{"answer": "1"}', "has no prompt, its keys are 'answer'; give 'prompt' or 'messages'"),
    ('{"prompt": "", "answer": "1"}', "key 'prompt' is ''"),
    (
        '{"prompt": "1=", "gold": "1"}',
        "has no answer, its keys are 'prompt', 'gold'; give 'answer', or name its column",
    ),
    ('{"prompt": "1=", "answer": true}', "key 'answer' is True"),
    ('{"prompt": "1=", "answer": NaN}', "key 'answer' is nan"),
    ('{"prompt": "123456789=", "answer": "5"}', "10 tokens are more than rollout.max_prompt_tokens 9"),
    ('{"messages": [{"role": "user", "content": "1"}], "answer": "1"}', "no chat template"),
    ('{"prompt": "1=", "tools": [{"type": "function"}], "answer": "1"}', "key 'tools' needs a chat template"),
    ('{"messages": [], "answer": "1"}', "key 'messages' is []"),
    ('{"messages": [{"role": "usr", "content": "1"}], "answer": "1"}', "{'role': one of system"),
    ('{"messages": [{"role": "assistant", "content": "1"}], "answer": "1"}', "holds the assistant's turn alone"),
    ('{"problem": "1=", "solution": "first\\nthen 3"}', "no \\boxed{...}; give the final answer as 'answer'"),
    # faults 9: half a character, which no tokenizer takes
    ('{"prompt": "1=\\ud83d", "answer": "1"}', "key 'prompt' holds '\\ud83d', half a character"),
    ('{"prompt": "1=", "answer": "1", "notes": ["\\uDE00"]}', "key 'notes' holds '\\ude00', half a character"),
    ('{"prompt": "1=", "answer": ' + "9" * 5000 + "}", "not JSON that Python reads"),
]


@pytest.mark.parametrize(("line", "message"), BAD, ids=range(len(BAD)))
def test_a_bad_line_is_named(tmp_path: Path, tokenizer, line: str | bytes, message: str) -> None:
    path = write(tmp_path, {"prompt": "1=", "answer": "1"}, "", line)
    with pytest.raises(UserError) as caught:
        load_prompts(path, tokenizer, max_tokens=9, on_bad_line="error")
    text = str(caught.value)
    assert (
        text.startswith(f"{path} line 3: ") and message in text and "data.on_bad_line=skip" in text and "\n" not in text
    )


def test_bad_lines_are_skipped_and_counted(tmp_path: Path, tokenizer) -> None:
    good = {"prompt": "1=", "answer": "1"}
    path = write(tmp_path, *(line for line, _ in BAD), good)
    prompts, bad = load_prompts(path, tokenizer, max_tokens=9, on_bad_line="skip")
    assert (len(prompts), bad, prompts[0].line) == (1, len(BAD), len(BAD) + 1)


def test_fault_09_a_line_separator_inside_a_text_does_not_end_its_row(tmp_path: Path, tokenizer) -> None:
    path = write(tmp_path, '{"prompt": "1\u2028+\u0085 1=", "answer": "2"}', {"prompt": "2=", "answer": "2"})
    prompts, bad = load_prompts(path, tokenizer, max_tokens=9, on_bad_line="error")
    assert ([p.line for p in prompts], bad) == ([1, 2], 0)


def test_fault_09_an_assistants_turn_at_the_end_opens_no_second_one(tmp_path: Path, chat) -> None:
    messages = [{"role": "user", "content": "2"}, {"role": "assistant", "content": "3"}]
    path, said = write(tmp_path, {"messages": messages, "answer": "3"}), []
    [prompt], _ = load_prompts(path, chat, max_tokens=64, on_bad_line="error", say=said.append)
    assert prompt.text == "u:2\na:"
    assert said == [
        f"{path}: 1 rows, the prompt from 'messages', the assistant's last turn left out, the answer from 'answer'"
    ]
    [(tokens, length)] = load_demonstrations(path, chat, 64, "error")
    assert chat.decode(tokens[:length]) == "u:2\na:".replace("u", "<unk>").replace("a", "<unk>")
    assert chat.decode(tokens[length:]) == "3<eos>"


def test_fault_09_tools_reach_the_chat_template_or_are_refused(tmp_path: Path, chat) -> None:
    row = {"messages": [{"role": "user", "content": "1"}], "tools": [{"type": "function", "function": {"name": "7"}}]}
    path = write(tmp_path, {**row, "answer": "1"}, {**row, "tools": json.dumps(row["tools"]), "answer": "1"})
    with pytest.raises(UserError, match="line 1: key 'tools': the tokenizer's chat template does not show them"):
        load_prompts(path, chat, max_tokens=64, on_bad_line="error")
    showing = make_tokenizer()
    showing.chat_template = "{% for t in tools %}{{ t.function.name }}{% endfor %}" + TEMPLATE
    prompts, _ = load_prompts(path, showing, max_tokens=64, on_bad_line="error")
    assert [p.text for p in prompts] == ["7u:1\na:"] * 2


def test_the_nones_of_arrow_structs_do_not_reach_the_chat_template(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "7", "arguments": {"a": "1"}}]}
    tools = [{"function": {"name": "7", "properties": {"a": {"type": "string"}}}}]
    others = [{"function": {"name": "8", "properties": {"b": {"type": "integer"}}}}]
    rows = [
        {"messages": [{"role": "user", "content": "1"}, call, {"role": "tool", "content": "2"}], "tools": tools},
        {"messages": [{"role": "user", "content": "3"}], "tools": others},
    ]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([row | {"answer": "4"} for row in rows]), tmp_path / "rows.parquet"
    )
    made = make_tokenizer()
    made.chat_template = '{"messages": {{ messages | tojson }}, "tools": {{ tools | tojson }}}'
    prompts, _ = load_prompts(tmp_path / "rows.parquet", made, max_tokens=999, on_bad_line="error")
    assert [json.loads(prompt.text) for prompt in prompts] == rows
    nulls = [{"function": {"name": "7", "properties": {"a": {"default": None}}}}]
    written = write(tmp_path, rows[0] | {"tools": nulls, "answer": "4"})  # in JSONL a null is meant
    [prompt], _ = load_prompts(written, made, max_tokens=999, on_bad_line="error")
    assert json.loads(prompt.text)["tools"] == nulls


def test_fault_09_one_bos_and_no_eos_before_a_response_and_one_behind_it(tmp_path: Path) -> None:
    made = make_tokenizer()
    made.bos_token = "<pad>"
    made.chat_template = "{{ bos_token }}{{ bos_token }}" + TEMPLATE
    path = write(tmp_path, {"prompt": "1=", "answer": "1", "response": "2<eos>"})
    [prompt], _ = load_prompts(path, made, max_tokens=64, on_bad_line="error")
    assert prompt.tokens.count(made.bos_token_id) == 1
    [(tokens, length)] = load_demonstrations(path, made, 64, "error")
    assert made.decode(tokens[length:]) == "2<eos>"
    from tokenizers.processors import TemplateProcessing

    made.chat_template = None
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<pad> $A <eos>", special_tokens=[("<pad>", 0), ("<eos>", 1)]
    )
    [prompt], _ = load_prompts(path, made, max_tokens=64, on_bad_line="error")
    assert made.decode(prompt.tokens) == "<pad>1="


CASES = Path(__file__).resolve().parents[1] / "cases"
PEERS: list[dict[str, Any]] = [json.loads(line) for line in (CASES / "peer_rows.jsonl").open(encoding="utf-8")]
PEERS += [
    {"row": {"question": "4 x 6?", "answer": "6 x 4 = 24. #### 1,024"}, "answer": "1024"},
    {"row": {"problem": "2+3.", "solution": "long\ntext", "answer": 5}, "answer": "5"},
    {"row": {"question": "2+3", "answer": "5.\n#### 5"}, "response": "5.\n#### 5"},
    {"row": {"instruction": "Add.", "input": "2 and 3", "output": "5"}, "response": "5", "text": "u:Add.\n2 and 3\na:"},
    {
        "row": {
            "prompt": [{"role": "user", "content": "2+3="}],
            "completion": [{"role": "assistant", "content": "5"}],
        },
        "response": "5",
    },
]


@pytest.mark.parametrize("case", PEERS, ids=[case.get("shape", "more") for case in PEERS])
def test_fault_21_rows_as_people_have_them(tmp_path: Path, chat, case: dict[str, Any]) -> None:
    path = write(tmp_path, case["row"])
    if "error" in case:
        named = case["error"].removeprefix("names ").replace("file and line", "key 'prompt'")
        with pytest.raises(UserError, match=f"rows.jsonl line 1: .*{named}"):
            load_prompts(path, chat, max_tokens=99, on_bad_line="error")
    elif "answer" in case:
        [prompt], _ = load_prompts(path, chat, max_tokens=99, on_bad_line="error")
        assert prompt.answer == case["answer"] and prompt.row == case["row"]
    else:
        [(tokens, length)] = load_demonstrations(path, chat, 99, "error")
        wanted = [*chat.encode(case["response"], add_special_tokens=False), chat.eos_token_id]
        assert tokens[length:] == wanted
        if "text" in case:
            assert tokens[:length] == chat.encode(case["text"], add_special_tokens=False)


def test_fault_21_columns_come_first_and_what_was_read_is_told(tmp_path: Path, tokenizer) -> None:
    row = {"text": "1=", "prompt": "2=", "meta": {"gold": 3}, "answer": "4", "said": "5"}
    columns, said = {"prompt": "text", "answer": "meta.gold", "response": "said"}, []
    path = write(tmp_path, row, {"prompt": "2=", "answer": "4", "response": "6"})
    loaded = dict(max_tokens=9, on_bad_line="error", columns=columns, say=said.append)
    prompts, _ = load_prompts(path, tokenizer, **loaded)
    assert [(p.text, p.answer) for p in prompts] == [("1=", "3"), ("2=", "4")]
    assert said == [
        f"{path}: 1 rows, the prompt from 'text', the answer from 'meta.gold'"
    ]  # the second is megarl's own
    [first, second] = load_demonstrations(path, tokenizer, 9, "error", columns)
    assert (tokenizer.decode(first[0]), tokenizer.decode(second[0])) == ("1=5<eos>", "2=6<eos>")


def test_a_named_column_that_no_row_has_is_refused() -> None:
    """Each file may have the columns that it needs in some of its rows; others are nobody's."""
    rows = [
        {"prompt": "1=", "answer": "2", "response": "3", "meta": {"gold": 4, "null": None}},
        {"prompt": "1=", "answer": "2"},
    ]

    def told(columns: Columns, kind: Kind = "prompts", needs_answer: bool = True) -> str:
        unseen = Unseen(columns, kind, needs_answer)
        for row in rows:
            unseen.look(row)
        try:
            unseen.refuse("rows.jsonl")
        except UserError as error:
            return str(error)
        return ""

    assert told({"tools": "meta.x", "answer": "meta.null"}) == ""  # no row need have tools; one may have a null
    for column in ("prompt", "answer"):
        said = f"data.columns names 'meta.x' for the {column}, which no row of 'rows.jsonl' has; correct it"
        assert told({column: "meta.x"}).startswith(said)  # type: ignore[dict-item]
    assert told({"answer": "meta.gold", "response": "said"}) == told({"answer": "gold"}, needs_answer=False) == ""
    assert "'said' for the response" in told({"response": "said", "answer": "gold"}, "demonstrations")


def test_fault_21_parquet_datasets_and_gzip(tmp_path: Path, chat) -> None:
    rows = [case["row"] for case in PEERS if case.get("shape") == "verl"] * 3
    plain = write(tmp_path, *rows)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    table = datasets.Dataset.from_list(rows)
    pyarrow.parquet.write_table(table.data.table, tmp_path / "rows.parquet")
    table.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "splits"))
    for name in ("rows.jsonl", "rows.jsonl.gz", "rows.parquet", "saved", "splits/test"):
        prompts, _ = load_prompts(tmp_path / name, chat, max_tokens=99, on_bad_line="error")
        assert [(p.text, p.answer, p.line, p.row["extra_info"]) for p in prompts] == [
            ("u:2+3=?\na:", "5", line, {"index": 0}) for line in (1, 2, 3)
        ], name
    with pytest.raises(UserError, match=r"splits' holds the splits train, test; give one"):
        load_prompts(tmp_path / "splits", chat, max_tokens=99, on_bad_line="skip")
    with pytest.raises(UserError, match=r"has no state.json; give a JSONL file"):
        load_prompts(tmp_path, chat, max_tokens=99, on_bad_line="skip")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "rows.parquet").read_bytes()[:200])
    with pytest.raises(UserError, match=r"cut.parquet' cannot be read as Parquet"):
        load_prompts(tmp_path / "cut.parquet", chat, max_tokens=99, on_bad_line="skip")
    packed = (tmp_path / "rows.jsonl.gz").read_bytes()
    for damaged in (packed[:40], packed[:10] + b"\xff" * 20 + packed[30:], packed[:-8] + b"\0" * 8):
        (tmp_path / "cut.gz").write_bytes(damaged)
        with pytest.raises(UserError, match=r"cut.gz' cannot be unpacked"):
            load_prompts(tmp_path / "cut.gz", chat, max_tokens=99, on_bad_line="skip")


@pytest.mark.parametrize(("name", "module"), [("rows.parquet", "pyarrow"), ("saved", "datasets")])
def test_fault_21_what_needs_the_extra_says_so(
    tmp_path: Path, chat, monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    table = datasets.Dataset.from_list([PEERS[0]["row"]])
    pyarrow.parquet.write_table(table.data.table, tmp_path / "rows.parquet")
    table.save_to_disk(str(tmp_path / "saved"))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"pip install 'megarl\[datasets\]'"):
        load_prompts(tmp_path / name, chat, max_tokens=99, on_bad_line="skip")


def test_a_template_that_refuses_a_row_is_a_bad_line(tmp_path: Path, chat) -> None:
    path = write(tmp_path, {"prompt": "13", "answer": "1"})
    with pytest.raises(UserError, match="line 1: the tokenizer's chat template refuses it .*unlucky"):
        load_prompts(path, chat, max_tokens=9, on_bad_line="error")


def test_missing_and_empty_files(tmp_path: Path, tokenizer) -> None:
    with pytest.raises(UserError, match=r"none.jsonl' does not exist; give a JSONL file"):
        load_prompts(tmp_path / "none.jsonl", tokenizer, max_tokens=9, on_bad_line="skip")
    with pytest.raises(UserError, match=r"no usable row \(0 bad lines\)"):
        load_prompts(write(tmp_path, "", " "), tokenizer, max_tokens=9, on_bad_line="error")
    with pytest.raises(UserError, match=r"no usable row \(2 bad lines\)"):
        next(load_demonstrations(write(tmp_path, "x", "y"), tokenizer, 9, "skip"))


def test_demonstrations(tmp_path: Path, tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    path = write(
        tmp_path, {"prompt": "12=", "response": "13"}, {"prompt": "12="}, {"prompt": "12=", "response": "12345"}
    )
    with pytest.raises(UserError, match="line 2: has no response, its keys are 'prompt'; give 'response', or messages"):
        [*load_demonstrations(path, tokenizer, 8, "error")]
    [(tokens, prompt_len)] = load_demonstrations(path, tokenizer, 8, "skip")
    assert prompt_len == 3 and tokenizer.decode(tokens) == "12=13<eos>" and tokens[-1] == tokenizer.eos_token_id
    assert "skipped 2 bad lines" in caplog.text


def test_stream_sees_each_prompt_once_an_epoch() -> None:
    stream = PromptStream(7, seed=3)
    epochs = [sorted(stream.next(7)) for _ in range(3)]
    assert epochs == [list(range(7))] * 3
    assert PromptStream(7, seed=3).next(21) != PromptStream(7, seed=4).next(21)
    assert PromptStream(3, shuffle=False).next(7) == [0, 1, 2, 0, 1, 2, 0]


def test_the_order_of_a_seed_is_that_of_earlier_releases() -> None:
    order = list(range(1000))
    random.Random("3/0").shuffle(order)
    assert PromptStream(1000, seed=3).next(1000) == order


def test_stream_resumes_exactly() -> None:
    rng = random.Random(0)
    for _ in range(50):
        n, before, after = rng.randint(1, 9), rng.randint(0, 30), rng.randint(1, 30)
        whole = PromptStream(n, seed=1)
        whole.next(before)
        resumed = PromptStream(n, seed=1)
        resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
        assert resumed.next(after) == whole.next(after)


def test_stream_refuses_the_state_of_another_run() -> None:
    for other, name in (
        (PromptStream(6, 0), "number of prompts"),
        (PromptStream(5, 1), "run.seed"),
        (PromptStream(5, 0, False), "data.shuffle"),
    ):
        with pytest.raises(UserError, match=name):
            PromptStream(5, 0).load_state_dict(other.state_dict())


@pytest.mark.parametrize(("keeps", "beside"), [(True, 512), (False, 20)])
def test_prompts_take_little_memory_beside_their_tokens_and_texts(
    tmp_path: Path, chat, keeps: bool, beside: int
) -> None:
    count, told = 400, {"split": "train", "source": "drawn", "level": 3}
    turns = [{"role": "user", "content": "12=" * 300}, {"role": "system", "content": "405"}]
    path = write(
        tmp_path, *({"messages": turns, "answer": "1", "extra_info": told | {"index": i}} for i in range(count))
    )
    how: dict[str, Any] = {"max_tokens": 9999, "on_bad_line": "error", "keeps": keeps}
    load_prompts(path, chat, **how)  # what it imports and caches is no prompt's
    tracemalloc.start()
    try:
        prompts, _ = load_prompts(path, chat, **how)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    own = sum(4 * len(prompt.tokens) + len(prompt.text) for prompt in prompts) if keeps else 0
    assert len(prompts) == count and (taken - own) / count < beside


def test_kept_prompts_are_the_ones_given() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    rows: list[dict[str, Any]] = [
        {"day": date(2026, 11, 30), "raw": b"1", "none": None, "share": float("inf"), "pairs": [("1", 2)], 3: {4: [5]}},
        {"audio": lambda: None},  # neither of these packs
        {"deep": deep},
    ]
    texts = ["u:1+1=\nu:1+1=\na:", "\ud83d\u2028\u6f22", ""]
    given = [Prompt([i, 2**31 - 1], str(i), text, i, row) for i, (text, row) in enumerate(zip(texts, rows))]
    given.append(Prompt([], "", "12=", 9, has_answer=False))
    kept = KeptPrompts()
    for prompt in given:
        kept.append(prompt, said=["1+1=", None, "", "nowhere", "1+1=", "1+1="])
    assert [p.row is q.row for p, q in zip(kept, given)] == [False, True, True, False]
    for shown in (kept, kept[:], kept[-3:], kept[::-1][1:], kept[2:][:1]):
        expected = [given[p.tokens[0] if p.tokens else -1] for p in shown]
        assert [vars(p) | {"row": 0} for p in shown] == [vars(q) | {"row": 0} for q in expected]
    assert [len(kept[:]), len(kept[-3:]), len(kept[::-1][1:]), len(kept[9:])] == [4, 3, 3, 0]
    assert kept[0] == given[0] and kept[-1] == given[3]
    with pytest.raises(IndexError):
        kept[4]


def test_prompts_that_are_only_counted() -> None:
    counted = KeptPrompts(keeps=False)
    assert not counted
    counted.append(Prompt([1], "1", "1", 1))
    assert len(counted) == len(counted[:5]) == 1
    with pytest.raises(AssertionError, match="asks no server"):
        counted[0]
