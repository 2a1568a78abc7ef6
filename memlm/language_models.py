"""The architectures: a thin LightningModule for each, with the options that it has."""

from memlm.language_model import LanguageModel
from memlm.memory import EngramConfig, MemoryConfig, PEERConfig
from memlm.optim import OptimizerConfig, ValuesOptimizerConfig
from memlm.pretrained import PretrainedConfig
from memlm.transformer import MoEConfig, TransformerConfig

__all__ = ["PEERLM", "DenseLM", "EngramLM", "LanguageModel", "MemoryLM", "MoELM"]


class DenseLM(LanguageModel):
    """A dense Llama-style transformer.

    Args:
        vocab_size: Entries of the tokenizer; linked to the data's.
        transformer: The decoder's options.
        optimizer: The optimiser's options.
        pretrained: A Hugging Face model to start from.
        compile: Whether to run the transformer under torch.compile.
    """

    def __init__(
        self,
        vocab_size: int,
        transformer: TransformerConfig = TransformerConfig(),
        optimizer: OptimizerConfig = OptimizerConfig(),
        pretrained: PretrainedConfig | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__(vocab_size, transformer, optimizer, compile, pretrained=pretrained)


class MoELM(LanguageModel):
    """A transformer whose feed-forward networks are mixtures of experts.

    Args:
        vocab_size: Entries of the tokenizer; linked to the data's.
        transformer: The decoder's options.
        moe: The mixtures' options.
        optimizer: The optimiser's options.
        pretrained: A Hugging Face model to start from.
        compile: Whether to run the transformer under torch.compile.
    """

    def __init__(
        self,
        vocab_size: int,
        transformer: TransformerConfig = TransformerConfig(),
        moe: MoEConfig = MoEConfig(),
        optimizer: OptimizerConfig = OptimizerConfig(),
        pretrained: PretrainedConfig | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__(vocab_size, transformer, optimizer, compile, experts=moe, pretrained=pretrained)


class MemoryLM(LanguageModel):
    """A transformer with memory layers in the place of some feed-forward networks, or beside them.

    Memory Layers at Scale (arXiv 2412.09764): Memory and Memory+.

    Args:
        vocab_size: Entries of the tokenizer; linked to the data's.
        transformer: The decoder's options.
        memory: The memory layers' options.
        optimizer: The dense parameters' optimiser.
        values_optimizer: The value rows' optimiser.
        moe: Options of mixtures of experts in the feed-forward networks that remain.
        pretrained: A Hugging Face model to start from.
        compile: Whether to run the transformer under torch.compile.
    """

    def __init__(
        self,
        vocab_size: int,
        transformer: TransformerConfig = TransformerConfig(),
        memory: MemoryConfig = MemoryConfig(),
        optimizer: OptimizerConfig = OptimizerConfig(),
        values_optimizer: ValuesOptimizerConfig = ValuesOptimizerConfig(),
        moe: MoEConfig | None = None,
        pretrained: PretrainedConfig | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__(
            vocab_size,
            transformer,
            optimizer,
            compile,
            memory_plan=memory,
            row_optimizer=values_optimizer,
            experts=moe,
            pretrained=pretrained,
        )


class PEERLM(LanguageModel):
    """A transformer with PEER layers: product keys choose among very many experts of one neuron.

    Mixture of A Million Experts (arXiv 2407.04153). The same options as of MemoryLM, with PEER's defaults.

    Args:
        vocab_size: Entries of the tokenizer; linked to the data's.
        transformer: The decoder's options.
        memory: The PEER layers' options.
        optimizer: The dense parameters' optimiser.
        values_optimizer: The optimiser of the experts, rows of two pools.
        moe: Options of mixtures of experts in the feed-forward networks that remain.
        pretrained: A Hugging Face model to start from.
        compile: Whether to run the transformer under torch.compile.
    """

    def __init__(
        self,
        vocab_size: int,
        transformer: TransformerConfig = TransformerConfig(),
        memory: PEERConfig = PEERConfig(),
        optimizer: OptimizerConfig = OptimizerConfig(),
        values_optimizer: ValuesOptimizerConfig = ValuesOptimizerConfig(),
        moe: MoEConfig | None = None,
        pretrained: PretrainedConfig | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__(
            vocab_size,
            transformer,
            optimizer,
            compile,
            memory_plan=memory,
            row_optimizer=values_optimizer,
            experts=moe,
            pretrained=pretrained,
        )


class EngramLM(LanguageModel):
    """A transformer that looks n-grams of its tokens up before the attention of some blocks.

    Engram: Conditional Memory via Scalable Lookup (arXiv 2601.07372).

    Args:
        vocab_size: Entries of the tokenizer; linked to the data's.
        transformer: The decoder's options.
        memory: The n-gram memory's options.
        optimizer: The dense parameters' optimiser.
        values_optimizer: The value rows' optimiser.
        moe: Options of mixtures of experts in the feed-forward networks that remain.
        pretrained: A Hugging Face model to start from.
        compile: Whether to run the transformer under torch.compile.
    """

    def __init__(
        self,
        vocab_size: int,
        transformer: TransformerConfig = TransformerConfig(),
        memory: EngramConfig = EngramConfig(),
        optimizer: OptimizerConfig = OptimizerConfig(),
        values_optimizer: ValuesOptimizerConfig = ValuesOptimizerConfig(),
        moe: MoEConfig | None = None,
        pretrained: PretrainedConfig | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__(
            vocab_size,
            transformer,
            optimizer,
            compile,
            memory_plan=memory,
            row_optimizer=values_optimizer,
            experts=moe,
            pretrained=pretrained,
        )
