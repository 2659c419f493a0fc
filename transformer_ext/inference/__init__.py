"""Decoding: the compiled engine behind :class:`Translator`, and a plain Python beam search.

Nothing here imports torch, except the functions that are given a torch model.
"""
