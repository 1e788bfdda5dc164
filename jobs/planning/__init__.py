"""Before a run: options become a recipe and a plan, and trials on this machine give an estimate."""
