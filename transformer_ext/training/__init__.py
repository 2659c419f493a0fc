"""Training: trainer, optimizer, schedules, checkpoints, reports.

:class:`~transformer_ext.training.trainer.Trainer` runs any model with the methods of
:class:`transformer_ext.model.Transformer`; ``python -m transformer_ext.train`` is the command.
"""
