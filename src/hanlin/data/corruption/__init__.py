"""How a pretraining method spoils a text that the model then repairs: one file a method, pure functions over token ids.

Every function that draws takes a `numpy.random.Generator`: the same ids and the same seed give the same result.
"""
