"""Where address state lives: the contract in `base`, one file for each store."""
