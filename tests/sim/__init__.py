"""A whole fleet in one thread: the production code under one seeded scheduler, with a virtual clock and faults.

How it works: docs/testing.md. One run: `python tests/sim --seed S --trace`.
"""
