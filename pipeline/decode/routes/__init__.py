"""One module per decoder, and the rules that choose between them (`choice`)."""
