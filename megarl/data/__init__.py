"""Prompts and demonstrations from data files, and the order in which a run sees them."""

from megarl.data.kept import KeptPrompts, Picked, Prompt
from megarl.data.prompts import demonstrations_of, load_demonstrations, load_prompts, prompts_of
from megarl.data.stream import PromptStream
from megarl.data.tokenizer import load_tokenizer
from megarl.data.vocabulary import Vocabulary, vocabulary_of

__all__ = [
    "KeptPrompts",
    "Picked",
    "Prompt",
    "PromptStream",
    "Vocabulary",
    "demonstrations_of",
    "load_demonstrations",
    "load_prompts",
    "load_tokenizer",
    "prompts_of",
    "vocabulary_of",
]
