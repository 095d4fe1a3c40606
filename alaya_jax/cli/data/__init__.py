"""The text and the questions of `alaya demo`.

constitution.txt holds the seven articles of 1787 without signatures and amendments, and a Schedule
of four clauses, marked there as added. How questions were found that SmolLM2-135M-Instruct (4-bit
file, float32 arithmetic, greedy) answers rightly, with transformers as the judge:

- Questions about the articles themselves fail at this length, or are guesses.
- A clause in the last paragraph of the text is the answer to every question; a sentence such as
  "Remember it" does the same from anywhere near the end. So the text ends with Article VII.
- Single clauses spread over the articles: some 6 of 13 right. Together in one Schedule after
  Article V: 7 of 9 questions right. The same after Article III, in another order: 8 of 9, and these
  are the clauses here. For each clause two wordings of the question were right there; the one with
  the larger lead over the runner-up was taken.
"""
