"""The commands of the command line, a module each: its arguments, and nothing else.

A module has a function `add(commands)` that declares the command. What runs is imported when it runs, because
`infopo --help` must not load torch.
"""
