"""Generation engines behind one protocol (base.py); engines.py opens the configured one."""
