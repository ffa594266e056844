"""Rows in, token ids out: prompts with their answers, and demonstrations. Every bad row is named by file and number."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megarl.config import Config
from megarl.data.kept import KeptPrompts, Prompt
from megarl.data.rows import BadLine, read_rows
from megarl.data.shapes import (
    DEMONSTRATION_ROW,
    PROMPT_ROW,
    Columns,
    Kind,
    Question,
    Unseen,
    answer_of,
    question_of,
    response_of,
)
from megarl.data.template import chat_templates
from megarl.data.tokenizer import highest_token, quick_encoder
from megarl.data.vocabulary import Vocabulary, vocabulary_of
from megarl.errors import UserError
from megarl.reward import answer_fault
from megarl.weights.map.weight_map import load_hf_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

OnBadLine = Literal["error", "skip"]
AnswerFault = Callable[[str], str]
PROMPT_LIMIT = "rollout.max_prompt_tokens"
WHOLE_LIMIT = "rollout.max_prompt_tokens + rollout.max_new_tokens ="


def prompts_of(
    config: Config,
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    needs_answer: bool = True,
    keeps: bool = True,
    say: Callable[[str], object] | None = None,
) -> tuple[Sequence[Prompt], int]:
    """load_prompts as the keys of `config` have it, the answers judged by what data.reward can read."""
    return load_prompts(
        path,
        tokenizer,
        max_tokens=config.rollout.max_prompt_tokens,
        on_bad_line=config.data.on_bad_line,
        columns=config.data.columns,
        fault_of_answer=partial(answer_fault, config.data.reward),
        needs_answer=needs_answer,
        keeps=keeps,
        say=say,
        vocabulary=vocabulary_of(config, tokenizer),
    )


def demonstrations_of(
    config: Config, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], object] | None = None
) -> Iterator[tuple[list[int], int]]:
    """load_demonstrations as the keys of `config` have it."""
    return load_demonstrations(
        config.sft.data,
        tokenizer,
        config.rollout.max_prompt_tokens + config.rollout.max_new_tokens,
        config.data.on_bad_line,
        config.data.columns,
        say=say,
        vocabulary=vocabulary_of(config, tokenizer),
    )


def load_prompts(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    on_bad_line: OnBadLine,
    columns: Columns = {},
    fault_of_answer: AnswerFault | None = None,
    needs_answer: bool = True,
    keeps: bool = True,
    say: Callable[[str], object] | None = None,
    vocabulary: Vocabulary | None = None,
) -> tuple[Sequence[Prompt], int]:
    """(prompts, number of bad rows) from rows of any shape that megarl.data.shapes knows.

    With a chat template every prompt goes through it, a plain text as one user message, and the turn of the assistant
    is opened; without one a plain text is encoded as it is. An assistant's turn that ends a row's messages is left out.
    needs_answer: else a row without a usable answer has none, and is no bad row.
    keeps: else the prompts are only counted.
    A prompt of more than `max_tokens` tokens is a bad row, and so is an answer of which `fault_of_answer` says
    something. say: is told once which keys were read, where they are not "prompt" or "messages" and "answer".
    vocabulary: the model's; None is the tokenizer's own.
    Raises UserError, one line, for a missing or empty file, and for the first bad row if `on_bad_line` is "error".
    """
    vocabulary = vocabulary or _vocabulary_of(tokenizer)
    prompts = KeptPrompts(keeps=keeps)
    shapes: Counter[str] = Counter()
    bad = 0
    for line, row in read_rows(path, PROMPT_ROW):
        try:
            row = _sound(row)
            question = question_of(row, columns)
            tokens, text = encode_prompt(question, tokenizer)
            _check_ids(tokens, vocabulary.size, tokenizer.convert_ids_to_tokens)
            _check_length(len(tokens), max_tokens, PROMPT_LIMIT)
            answer, where = (_answer if needs_answer else _known_answer)(row, columns, fault_of_answer)
            prompt = Prompt(tokens, answer, text, line, row, needs_answer or where != "")
            prompts.append(prompt, said=[message.get("content") for message in question.messages])
            shapes[_shape(question, "the answer from", where, "left out")] += 1
        except BadLine as error:
            bad += _bad_line(path, line, error, on_bad_line)
    _refuse_nothing(path, len(prompts), bad)
    _tell(path, shapes, say)
    return prompts, bad


def load_demonstrations(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    on_bad_line: OnBadLine,
    columns: Columns = {},
    say: Callable[[str], object] | None = None,
    vocabulary: Vocabulary | None = None,
) -> Iterator[tuple[list[int], int]]:
    """(prompt + response + end, length of the prompt) from rows with a prompt and a response, as load_prompts; each as
    it is read.

    The response is a key of the row or the assistant's turn that ends its messages; earlier turns are prompt.
    `max_tokens` bounds the whole. Skipped rows are counted in one log line.
    """
    vocabulary = vocabulary or _vocabulary_of(tokenizer)
    shapes: Counter[str] = Counter()
    kept = bad = 0
    for line, row in read_rows(path, DEMONSTRATION_ROW):
        try:
            row = _sound(row)
            question = question_of(row, columns)
            response, where = response_of(row, columns, question)
            prompt, _ = encode_prompt(question, tokenizer)
            tokens = prompt + ended(_encode(tokenizer, response), vocabulary.ends)
            _check_ids(tokens, vocabulary.size, tokenizer.convert_ids_to_tokens)
            _check_length(len(tokens), max_tokens, WHOLE_LIMIT)
            shapes[_shape(question, "the response from", where, "")] += 1
            kept += 1
            yield tokens, len(prompt)
        except BadLine as error:
            bad += _bad_line(path, line, error, on_bad_line)
    _refuse_nothing(path, kept, bad)
    _tell(path, shapes, say)
    if bad:
        log.warning("%s: skipped %d bad lines, kept %d", path, bad, kept)


def check_rows(
    config: Config, path: str | Path, kind: Kind, *, needs_answer: bool = True, all_columns: bool = False
) -> None:
    """Raises UserError as loading the file would, for what shows before any process starts: shapes, answers, a chat
    template that is missing, tokens that the model has not, and texts that are too long whatever a template adds.
    all_columns: refuses a named column that no row has.
    """
    shape, limit = (PROMPT_ROW, PROMPT_LIMIT) if kind == "prompts" else (DEMONSTRATION_ROW, WHOLE_LIMIT)
    rollout, columns = config.rollout, config.data.columns
    longest = rollout.max_prompt_tokens + (rollout.max_new_tokens if kind == "demonstrations" else 0)
    template = any(text for _, text in chat_templates(config.model.path).values())
    check_tokens = _quick_check(config.model.path, longest, limit)
    usable = bad = 0
    unseen = Unseen(columns, kind, needs_answer)
    for line, row in read_rows(path, shape):
        try:
            row = _sound(row)
            unseen.look(row)
            question = question_of(row, columns)
            response = ""
            if kind == "demonstrations":
                response, _ = response_of(row, columns, question)
            elif needs_answer:
                _answer(row, columns, partial(answer_fault, config.data.reward))
            if not template:
                _needs_no_template(question)
            # Of earlier turns of the assistant a template may leave the thoughts out.
            shown = [message.get("content") for message in question.messages if message["role"] != "assistant"]
            check_tokens(shown, response)
            usable += 1
        except BadLine as error:
            bad += _bad_line(path, line, error, config.data.on_bad_line)
    _refuse_nothing(path, usable, bad)
    if all_columns:
        unseen.refuse(path)


def _quick_check(path: str, longest: int, limit: str) -> Callable[[Sequence[Any], str], None]:
    """A check of the texts of a row, by tokenizer.json alone. It encodes only what may be wrong: a token is a byte or
    more, and most tokenizers have no token that the model lacks.
    """
    encode, highest = quick_encoder(path), highest_token(path)
    size = load_hf_config(path)["vocab_size"]

    def check(contents: Sequence[Any], response: str) -> None:
        texts = [text for text in contents if isinstance(text, str)]
        if encode is None:
            return
        if highest is not None and highest >= size:
            for text in (*texts, response):
                _check_ids(encode(text), size, partial(_in_text, text))
        text = max(texts, key=len, default="") + response
        if len(text.encode()) > longest:
            _check_length(len(encode(text)), longest, limit)

    return check


def first_prompt(config: Config, path: str | Path) -> tuple[dict[str, Any], str, str] | None:
    """(row, text of its last message, answer) of the first usable row with an answer."""
    for _, row in read_rows(path, PROMPT_ROW):
        with contextlib.suppress(BadLine):
            row = _sound(row)
            question = question_of(row, config.data.columns)
            answer, _ = _answer(row, config.data.columns, partial(answer_fault, config.data.reward))
            return row, str(question.messages[-1]["content"]), answer
    return None


def encode_prompt(question: Question, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], str]:
    """(tokens, text) of what the model is given. Raises BadLine where the tokenizer cannot."""
    if tokenizer.chat_template:
        text = _render(question, tokenizer, question.tools)
        if question.tools and _ignores_tools(question, tokenizer, text):
            raise BadLine("key 'tools': the tokenizer's chat template does not show them to the model; leave them out")
        tokens = _encode(tokenizer, text)
    else:
        text = _needs_no_template(question)
        tokens = _encode(tokenizer, text, special=True)
        plain = _encode(tokenizer, text)
        while tokens and tokens[-1] == tokenizer.eos_token_id and plain[-1:] != tokens[-1:]:
            tokens.pop()  # a post-processor's, which would end the response before it begins
        if tokens and tokens[-1] == tokenizer.eos_token_id:
            raise BadLine(f"key {question.key!r} ends with {tokenizer.eos_token!r}, which ends a response; take it off")
    if len(tokens) > 1 and tokens[0] == tokens[1] == tokenizer.bos_token_id:
        tokens = tokens[1:]  # the text's and the template's, or the post-processor's
    if not tokens:
        raise BadLine(f"key {question.key!r} tokenises to nothing; give a text that the tokenizer knows")
    return tokens, text


def _needs_no_template(question: Question) -> str:
    if question.tools:
        raise BadLine("key 'tools' needs a chat template, the tokenizer has none; leave it out, or add one")
    if question.text is None:
        raise BadLine(
            f"has messages under {question.key!r}, but the tokenizer has no chat template; give a text under 'prompt', "
            "or put chat_template.jinja into model.path"
        )
    return question.text


def ended(response: list[int], ends: Sequence[int]) -> list[int]:
    """The response with one end: the first of `ends`, where it has none of them yet."""
    return response if response and response[-1] in ends else [*response, ends[0]]


def _render(question: Question, tokenizer: PreTrainedTokenizerBase, tools: list[Any] | None) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(question.messages, tools=tools, tokenize=False, add_generation_prompt=True)
        )
    except Exception as error:  # templates are programs: they raise what they like about a row
        raise BadLine(
            f"the tokenizer's chat template refuses it ({' '.join(str(error).split())}); mend {question.key!r}"
        ) from None


def _ignores_tools(question: Question, tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    try:
        return text == _render(question, tokenizer, None)
    except BadLine:
        return False


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = False) -> list[int]:
    try:
        return list(tokenizer.encode(text, add_special_tokens=special))
    except Exception as error:  # whatever a tokenizer raises about a text belongs to its row
        raise BadLine(f"the tokenizer refuses it ({' '.join(str(error).split())[:160]}); mend the text") from None


def _answer(row: dict[str, Any], columns: Columns, fault_of_answer: AnswerFault | None) -> tuple[str, str]:
    answer, where = answer_of(row, columns)
    if fault_of_answer and (fault := fault_of_answer(answer)):
        raise BadLine(f"answer {answer!r}, from {where}: {fault}")
    return answer, where


def _known_answer(row: dict[str, Any], columns: Columns, fault_of_answer: AnswerFault | None) -> tuple[str, str]:
    """("", "") where there is none that can be used."""
    try:
        return _answer(row, columns, fault_of_answer)
    except BadLine:
        return "", ""


def _sound(row: dict[str, Any] | BadLine) -> dict[str, Any]:
    if isinstance(row, BadLine):
        raise row
    return row


def _vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos token, so a response could not end; give rollout.stop_token_ids=[ID]")
    return Vocabulary(len(tokenizer), (tokenizer.eos_token_id,))


def _in_text(text: str, token: int) -> str:
    return f"in {text[-40:]!r}"


def _check_ids(tokens: Sequence[int], size: int, name: Callable[[int], Any]) -> None:
    if tokens and (token := max(tokens)) >= size:
        raise BadLine(
            f"token {token} of the tokenizer ({name(token)}) is not below config.json's vocab_size {size}; resize the "
            "model's embeddings to the tokenizer, or take the token out"
        )


def _check_length(length: int, max_tokens: int, limit: str) -> None:
    if length > max_tokens:
        raise BadLine(f"{length} tokens are more than {limit} {max_tokens}; shorten it or raise that key")


def _shape(question: Question, what: str, where: str, last: str) -> str:
    """Which keys a row was read by; "" for megarl's own."""
    turn = f", the assistant's last turn {last}" if last and question.last is not None else ""
    if (
        not turn
        and where in ("", "'answer'", "'response'")
        and (question.key, question.text is None)
        in (
            ("messages", True),
            ("prompt", False),
        )
    ):
        return ""
    return f"the prompt from {question.key!r}{turn}" + (f", {what} {where}" if where else "")


def _tell(path: str | Path, shapes: Counter[str], say: Callable[[str], object] | None) -> None:
    for shape, rows in shapes.items():
        if say and shape:
            say(f"{path}: {rows} rows, {shape}")


def _bad_line(path: str | Path, line: int, error: BadLine, on_bad_line: OnBadLine) -> int:
    if on_bad_line == "error":
        raise UserError(f"{path} line {line}: {error}; or set data.on_bad_line=skip") from None
    return 1


def _refuse_nothing(path: str | Path, usable: int, bad: int) -> None:
    if not usable:
        raise UserError(f"data file {str(path)!r} holds no usable row ({bad} bad lines); give at least one")
