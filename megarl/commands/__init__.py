"""What `megarl COMMAND` runs on every rank, one file a command, and the arguments of all of them."""
