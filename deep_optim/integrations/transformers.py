"""Hugging Face's Trainer, which builds the optimizer itself, from the model.

Given a class, it hands over two groups of parameters without names, by which embeddings and heads cannot be told from
hidden matrices. Given a factory, it hands over the model.
"""

from typing import Any

from torch import nn

from deep_optim.create import create_optimizer
from deep_optim.optimizers.base import MemoryOptimizer


def for_trainer(name: str, args: Any, **options: Any) -> tuple[type["OptimizerFactory"], dict[str, Any]]:
    """Return what `transformers.Trainer` takes as `optimizer_cls_and_kwargs`.

    Args:
        name: one of `deep_optim.list_optimizers()`.
        args: the `TrainingArguments`, whose `learning_rate` and `weight_decay` are used.
        options: of `deep_optim.create_optimizer`, before those of `args`.

    Raises:
        ImportError: without transformers, or with one that does not know factories.

    Example:
        >>> Trainer(model, args, optimizer_cls_and_kwargs=for_trainer("DMGD", args))  # doctest: +SKIP
    """
    try:
        from transformers.trainer_optimizer import is_optimizer_factory  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "Hugging Face's Trainer needs transformers with optimizer factories (tested: 5.24): "
            'pip install "deep_optim[hf]"'
        ) from error
    return OptimizerFactory, {
        "name": name,
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
        **options,
    }


class OptimizerFactory:
    """What Trainer calls twice: `OptimizerFactory()(model, **options)` is `create_optimizer`."""

    def __call__(self, model: nn.Module, name: str, **options: Any) -> MemoryOptimizer:
        return create_optimizer(name, model, **options)
