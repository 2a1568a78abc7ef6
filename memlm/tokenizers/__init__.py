"""Text to token ids and back: raw bytes, a ``tokenizer.json``, a SentencePiece model or tiktoken ranks.

Every tokenizer knows how many UTF-8 bytes each of its tokens stands for, so that a loss in nats per token
becomes bits per byte, which compares models whose tokenizers differ.
"""

from memlm.tokenizers.base import EOS_TOKENS, Tokenizer
from memlm.tokenizers.byte_tokenizer import ByteTokenizer
from memlm.tokenizers.huggingface_json import FileTokenizer, JsonTokenizer, word_tokenizer
from memlm.tokenizers.loading import load_tokenizer
from memlm.tokenizers.sentencepiece_model import SentencePieceTokenizer
from memlm.tokenizers.tiktoken_ranks import TiktokenTokenizer
from memlm.tokenizers.training import train_bpe

__all__ = [
    "EOS_TOKENS",
    "ByteTokenizer",
    "FileTokenizer",
    "JsonTokenizer",
    "SentencePieceTokenizer",
    "TiktokenTokenizer",
    "Tokenizer",
    "load_tokenizer",
    "train_bpe",
    "word_tokenizer",
]
