"""Pure functions: which frames make a clip (`rules`), at which rate (`rate`), and how vectors are pooled (`pool`)."""
