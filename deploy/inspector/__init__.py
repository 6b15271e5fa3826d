"""`grpo-lambda inspect RUN`: a page that shows a run down to the credit of every token.

segments      one segment of the trajectory log: an index of its groups, access to any, text search
ledger_view   the ledger's side of the groups
query         what the table of groups may be asked
details       one group with all its tokens, as JSON
tokens        texts of tokens, by the run's own tokenizer
run_data      all of it for one run directory, kept up to date
server        the page on loopback
single_file   the page and a sample of the run in one HTML file
static/       the page: HTML, CSS and ES modules, used as they are by both

Everything reads; nothing here writes into a run directory.
"""
