"""Benchmark of the local engine against model.generate; see trd_megatron/bench/engine.py or --help."""

from trd_megatron.bench.engine import main

if __name__ == "__main__":
    main()
