"""What can be told before anything is trained: the tables and answers of the command line."""
