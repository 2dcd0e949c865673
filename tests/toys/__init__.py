"""Extensions from outside: a task, a decoder and a kind of regions, each one file and one line that
registers it.
"""
