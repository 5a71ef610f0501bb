"""Takes: nothing but arrays. Gives: the private ops, each with one contract and five faces that agree.

May import: no other room.
"""
