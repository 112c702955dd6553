"""Start and watch a group of ranks: the driver's side, the launcher process, and what each rank runs."""
