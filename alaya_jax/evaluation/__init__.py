"""Whether a plan keeps the answers: lm-eval's tasks under any plan, tasks with known answers at any
length, and policies held against full attention at equal keys read.
"""
