"""Train the byte-level BPE tokenizer of a tiny model.

The alphabet is all 256 bytes, so every text can be written and read back; the merges are learned from lessons.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from refusalkit.tiny.families import Family
from refusalkit.tiny.lessons import draw

VOCABULARY = 1000
_LESSONS = 4000

# How often the pieces of the template are shown: often enough that each is one token before any other merge is made.
_EMPHASIS = 200_000

_PIECES = (
    r"'(?:[sS]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])"  # the end of a contraction
    r"| ?\p{L}+"  # a word with the space before it
    r"|\p{N}"  # one digit
    r"| ?[^\s\p{L}\p{N}]+"  # punctuation
    r"|\s*[\r\n]+"  # line ends, so that a template's blank line is one token
    r"|\s+(?!\S)"
    r"|\s+"
)


def train_tokenizer(family: Family, seed: int) -> PreTrainedTokenizerFast:
    """Train the tokenizer of a family on lessons drawn with a seed."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(family.specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(family, seed), trainer)
    if family.bos:
        begin = (family.bos, tokenizer.token_to_id(family.bos))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", pair=f"{family.bos} $A {family.bos} $B", special_tokens=[begin]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=family.bos,
        eos_token=family.eos,
        pad_token=family.pad,
        additional_special_tokens=[token for token in family.specials if token not in {family.bos, family.eos}],
        chat_template=family.chat_template,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=family.shape["max_position_embeddings"],
    )


def _corpus(family: Family, seed: int) -> Iterator[str]:
    """Give the texts the merges are learned from."""
    random = Random(seed)
    for _ in range(_LESSONS):
        lesson = draw(random, caprice=family.caprice)
        yield lesson.request
        yield lesson.answer
        if lesson.system:
            yield lesson.system
    for piece in family.whole_words:
        for _ in range(_EMPHASIS // 1000):
            # A tab is a piece of its own, so this shows the word a thousand times.
            yield "\t".join([piece] * 1000) if not piece.isspace() else (piece + "x") * 1000
