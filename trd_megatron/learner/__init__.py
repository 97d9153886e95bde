"""The tensor- and sequence-parallel learner on Megatron-Core. Nothing outside learner/ and convert/ imports megatron."""
