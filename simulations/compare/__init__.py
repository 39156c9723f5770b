"""Adapters side by side under one protocol: `fedvb compare`.

`scores`, `results` and `tables` need neither Flower nor torch: the bench of learning prints with them too.
"""
