"""The capacity planner: what a configuration needs of memory and time, from first principles and stated assumptions (`trd plan`)."""
