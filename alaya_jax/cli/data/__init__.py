"""The text and the questions of `alaya demo`.

constitution.txt holds the seven articles of 1787 without signatures and amendments, and a Schedule
of four clauses, marked there as added. How questions were found that SmolLM2-135M-Instruct (4-bit
file, float32 arithmetic, greedy) answers rightly, with transformers as the judge:

- Of 16 questions about the articles themselves none was answered, except by chance: at this length
  the model talks of constitutions in general.
- A clause in the last paragraph becomes the answer to every question, and so does "Remember it"
  near the end. So the text ends with Article VII.
- Clauses spread over the articles, one each: 8 of 20 questions answered rightly. All in one
  Schedule after Article IV: 6 of 9; after Article III, in another order: 7 of 8, which is the text
  here.
- Where two wordings of a question were right, the one whose tokens led the runner-up by more was
  taken; the smallest lead of any token is 0.4 (tests/data/goldens/demo.json).
"""
