"""Several processes as one run: started, watched, joined and left. Knows no other part of a run."""
