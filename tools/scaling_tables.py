#!/usr/bin/env python
"""Prints the planner's tables of docs/scaling.md."""

from trd_megatron.capacity.scaling import markdown

if __name__ == "__main__":
    print(markdown(), end="")
