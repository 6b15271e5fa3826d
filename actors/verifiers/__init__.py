"""Rules that turn a completion into a verdict.

`base`: what a verdict is, and how an answer is found in a text. `registry`: names to callables.
`reasoning_gym`, `math_answer`, `format_rules`, `choice`, `code_tests`: the built-in rules. They run
in the child process of `actors.sandbox.sandbox`, on its main thread, and nowhere else; `code_child`
is the process below it in which `code_tests` runs a program.
"""
