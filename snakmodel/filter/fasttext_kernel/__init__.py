"""fastText's prediction of the first label in Numba, for many texts at a time and with the library's own results.

  dictionary   a word -> its hash and its entry
  subwords     a word -> the rows of its n-grams
  vectors      a text -> the mean vector of its words and of their n-grams
  labels       a vector -> the best label and its probability

Sums are taken in the library's order and in single precision, so that labels and probabilities are equal to those of
its builds for x86-64 to the last bit (Joulin et al. 2017, Bag of Tricks for Efficient Text Classification; fastText
0.9.2).
"""
