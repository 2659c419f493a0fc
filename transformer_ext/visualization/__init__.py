"""Pictures: one module for each, with the data behind it as a function of its own.

``python -m transformer_ext.visualize`` is the command. matplotlib is imported when something is
drawn, not before.
"""
