"""Models from and to the directories of Hugging Face's ``transformers``, which is not needed for it.

Directories of BERT and GPT-2 are opened wherever a model directory is taken
(:func:`transformer_ext.files.load_model_dir`): what ``config.json`` says is taken over or refused by
name, weights are converted as they are asked for. :func:`from_huggingface` writes a model directory
of such a folder, and of one of MarianMT; :func:`to_huggingface` goes the other way.
"""

from transformer_ext.huggingface.conversion import Conversion
from transformer_ext.huggingface.convert import from_huggingface, to_huggingface
from transformer_ext.huggingface.fields import HuggingFaceError

__all__ = ["Conversion", "HuggingFaceError", "from_huggingface", "to_huggingface"]
