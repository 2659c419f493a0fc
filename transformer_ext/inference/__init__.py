"""Models at work: the compiled engines, texts in and out on top of them, a plain Python beam search.

Nothing here imports torch, except the functions that are given a torch model.
"""
