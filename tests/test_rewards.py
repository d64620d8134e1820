"""Rewards: every convention of answer equality, hostile completions, fuzzing, containment of programs."""

import builtins
import os
import random
import sys
import threading
import time

import pytest
import sympy

import grpo
from grpo import Problem, answers_equal, extract_answer

# A reference, then texts that equal it, in both directions. || begins another reference.
EQUAL = r"""
\frac12 | 1/2 | 0.5 | .5 | \dfrac{1}{2} | \tfrac12 | \frac{2}{4} | $\frac{1}{2}$ | \frac 12 | 1/2 cup
\frac{1}{2} | \frac1{2} | \frac{1}2 | 1/2. | (1/2) | \left(\frac{1}{2}\right) | \boxed{\frac{1}{2}}
\frac{1}{2} | \[\frac{1}{2}\] | \(\frac{1}{2}\) | 2^{-1} | \displaystyle\frac{1}{2}
-\frac{35}{9} | -35/9 | \frac{-35}{9} | \frac{35}{-9} | −35/9 | -3\frac{8}{9}
1234 | 1,234 | 1{,}234 | 1,\!234 | 1\,234 || 1,234 | 1234 | 1234.0 | $1234 | \$1,234 | 1,234 dollars
1,234,567 | 1234567 || 11,\! 111,\! 111,\! 100 | 11111111100 | 11,111,111,100 || 10,\!000 | 10000 | 10^4
5 | \$5 | $5 | $5$ | \$5.00 | 5. | 5.0 | 5.00 | 05 | +5 | x=5 | x = 5 | $x=5$ | n=5 | AB=5
5 | AB = 5\text{ cm} | a+b=5 | \angle ABC = 5^\circ | 5 apples | 5 cm | 5\text{ cm} | 5\,\text{cm}
5 | 5\mathrm{~cm} | 5 \mathrm{cm}^2 | 5\text{ cm}^2 | 5\text{ square units} | 5 square centimeters
5 | 5 miles per hour | 5 mph | 5\text{ km/h} | 5 hours | 5 days | 5\text{ days} | 5\% | 5%
5 | 5 percent | 5^\circ | 5° | 5^{\circ} | 5 degrees | 5\text{ degrees} | 5 dollars | \text{5} | \mathbf{5}
5 | \textbf{5} | {5} | \{5\} | \frac{10}{2} || 5 | 2+3 | \sqrt{25} | 5\text{th} | 5th
5 | 5\text{ units}^2 | 5\text{ sq. units} | 5\text{ sq. ft.} | 5\text{ cubic feet} | The final answer is $5$.
5 | 5\text{ feet per second} | 5\text{ m/s} | 5\,\mathrm{m/s} | 5\ \mathrm{kg} | 5\text{ km} | 5\text{ L}
5 | 5^\circ\text{C} | 5°C || x=5 | 5 | x = 5 || 50\% | 50 | 50% | 50 percent
90^\circ | 90 | 90° | 90 degrees | 90^{\circ} | 90\text{ degrees} | 90\,^\circ
\$18.90 | 18.90 | 18.9 | \$18.9 | $18.90$ | 18.90 dollars | \frac{189}{10} || \$32,\!348 | 32348 | \$32,348
5.4 \text{ cents} | 5.4 | 5.4 cents || 15\mbox{ cm}^2 | 15 | 15 \text{ cm}^2 | 15 cm^2
\frac{270}7\text{ degrees} | \frac{270}{7} | \frac{270}{7}^\circ
\sqrt2 | \sqrt{2} | √2 | sqrt(2) | 2^{1/2} | 2^{\frac{1}{2}} | \frac{2}{\sqrt{2}}
11\sqrt2 | 11\sqrt{2} | 11 \cdot \sqrt{2} | \sqrt{242} || 3\sqrt{13} | 3 \sqrt{13} | \sqrt{117} | 3*sqrt(13)
\frac{\sqrt{3}}{3} | \frac{1}{\sqrt{3}} | 1/\sqrt{3} | \frac{\sqrt3}3 || \sqrt[3]{2} | 2^{1/3}
\sqrt[3]{4} | \sqrt[3]4 | 4^{\frac13} || 1+\sqrt{2} | \sqrt{2}+1
\sqrt{3}-\sqrt{2} | \frac{1}{\sqrt{3}+\sqrt{2}} || 2\pi | 2π | 2 \pi | 2*pi | \pi \cdot 2 | 2pi || \pi | π
\frac{\pi}{2} | \pi/2 | \frac{1}{2}\pi | 0.5\pi || 6 - 5i | 6-5i | -5i+6 | 6-5\mathrm{i} | 6 - 5 \cdot i
-2 + 7i | 7i-2 | 7i - 2
\left( 3, \frac{\pi}{2} \right) | (3,\pi/2) | \left(3,\frac{\pi}{2}\right) | (3, \frac{\pi}{2})
\left( 3, \frac{\pi}{2} \right) | (r,\theta) = (3, \frac{\pi}{2})
(1,2) | (1, 2) | \left(1,2\right) | 1,2 | x=1,y=2 | (x,y)=(1,2) | \langle 1,2\rangle || (1.5, 2) | (3/2, 2)
1,-2 | -2,1 | 1, -2 | x=1,-2 | x=1, x=-2 | x = 1 or x = -2 | x=1 \text{ or } x=-2 | 1 and -2
1,-2 | 1 \text{ and } -2 | \{1,-2\} | \{-2,1\} | -2 and 1 || 1,2,3 | 1, 2, and 3 | a=1, b=2, c=3
3, 5, 7 | 3,5,7 | 7, 5, 3 | 3, 5, and 7 | \{3,5,7\} | 3, 5, \text{ and } 7
\{1,2\} | \{2,1\} | 1,2 | \left\{1,2\right\} | \lbrace 1, 2\rbrace | \{1,1,2\}
\{1\pm\sqrt{5},-2\} | \{-2,1+\sqrt5,1-\sqrt5\} | 1+\sqrt{5}, 1-\sqrt{5}, -2 | 1 \pm \sqrt{5}, -2
1 \pm \sqrt{19} | 1+\sqrt{19},1-\sqrt{19} | x = 1\pm\sqrt{19} | 1 ± √19
\pm 2 | 2,-2 | -2, 2 | ±2 | x=\pm 2 | \{-2,2\}
\frac{1\pm\sqrt{5}}{2} | \frac{1+\sqrt5}{2}, \frac{1-\sqrt5}{2} || [-2,7] | x \in [-2,7]
x \in [-2,7] | [-2,7] | [-2, 7]
(0,9) \cup (9,36) | (0,9)\cup(9,36) | (9,36)\cup(0,9) | (0, 9) ∪ (9, 36) | x \in (0,9) \cup (9,36)
\left(\frac{3}{5},\frac{8}{3}\right] | (3/5, 8/3] | \left( 0.6, \frac83 \right]
(-\infty, 5] | (-inf, 5] | (-∞,5] || (3,\infty) | (3, +\infty) || x>3 | x > 3 || x \ge 3 | x \geq 3
(-\infty,-2)\cup(2,\infty) | (2,\infty)\cup(-\infty,-2) || \text{all real numbers} | all real numbers
52_8 | 52_{8} | 52_8 | (52)_8 | 52_{\text{8}} || 2516_8 | 2516_{8} || 4343_6 | 4343_{6} || 11011_2 | 11011_{2}
y = 2x + 3 | y=2x+3 | 2x+3 | y = 3+2x | 2x - y + 3 = 0 | y=3+2x || 3x+4y-12=0 | 6x+8y-24=0
3x+4y=12 | 3x+4y-12=0 || x^2+y^2=1 | y^2+x^2=1 | 1 = x^2+y^2 || x^2+2x+1 | (x+1)^2 | 1+2x+x^2
x^3+3x-6 | x^3 + 3x - 6 | x^{3}+3x-6 | x**3 + 3*x - 6 | -6+3x+x^3 | p(x)=x^3+3x-6 | f(x) = x^3+3x-6
(2x+1)(x-3) | 2x^2-5x-3 | (x-3)(2x+1) | (x - 3) \cdot (2x + 1) || 6r^2-4r-24 | 6r^2 - 4r - 24 | 2(3r^2-2r-12)
p - q | p-q | -q+p | -(q-p) || 2k+2 | 2(k+1) || 3R^2 | 3 R^2 | 3R^{2} || \frac{x+2}{x} | 1+\frac{2}{x}
\frac{x}{2} | 0.5x | x/2 | \frac{1}{2}x || xy | yx || 2xy | 2yx || e^x | e^{x} || e^{2} | e^2 | \exp(2)
\ln 2 | \ln(2) | \ln{2} | -\ln\frac{1}{2} || \ln 4 | 2\ln 2 || \sin x | \sin(x) || \sin 2x | 2\sin x\cos x
\tan 60^\circ | \sqrt3 || \cot x | \frac{\cos x}{\sin x} || 2\cos(a) | 2 \cos a || \arcsin 1 | \frac{\pi}{2}
3^{20} | 3486784401 || 3.2 \times 10^5 | 320000 | 3.2e5 | 3.2 \cdot 10^{5} | 320,000
6.72 \times 10^{-5} | .0000672 || 2^{10} | 1024 || 2^10 | 1024 || 1\frac{4}{5} | \frac95 | 1.8 | 1 4/5 | 9/5
3\frac{1}{2} | 3.5 || 3\frac12 | \frac{7}{2} || 3\frac{1}{2}\text{ hours} | 3.5
\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix} | \begin{pmatrix}-\frac13\\\frac23\\\frac53\end{pmatrix}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | \begin{pmatrix}1&2\\3&4\end{pmatrix}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | \begin{bmatrix}1&2\\3&4\end{bmatrix}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | \left[\begin{array}{cc}1&2\\3&4\end{array}\right]
\begin{pmatrix} 1 \\ 2 \end{pmatrix} | \begin{pmatrix} 1 \\ 2 \\ \end{pmatrix}
\text{(C)} | C | (C) | \text{C} || (\text{C}) | C
C | \text{(C)} | (C) | \textbf{(C)} | \mathrm{C} | C. | $C$ || \text{C} | C || E | \text{E}
\text{even} | even | Even || \text{Evelyn} | Evelyn | \text{evelyn} | \textbf{Evelyn} || \text{odd} | odd
\text{yes} | Yes || \text{no} | No || \text{June 20} | June 20 | june 20 || \text{Monday} | Monday | monday.
\text{no solution} | no solution | No solution || \text{ellipse} | ellipse || A,B,C | A, B, C
A, B | \text{A, B} || \text{A and B} | A and B || \emptyset | \varnothing | ∅ || 5:30 | 5:30 || 3:2 | 3 : 2
3:4:5 | 3 : 4 : 5 || 2.5 | \frac{5}{2} | 5/2 | 2\frac12 | 2.50 || 0.35625 | .35625 || -50 | -50.0 | - 50 | −50
\frac{3}{56} | \frac{6}{112} | 3/56 || \frac{243}{625} | 0.3888 | 38.88/100 || 13535 | 13,535
2220 | 2{,}220 || 58,500 | 58500 | 58500.00 || -1 | i^2 | -1 || 2+\sqrt{3} | \sqrt{3} + 2
\frac{2+\sqrt{3}}{2} | 1+\frac{\sqrt3}{2} || x^{1/3} | \sqrt[3]{x} || x^{\frac12} | \sqrt{x}
\frac{1}{x^2} | x^{-2} || \sqrt{x^2+1} | (x^2+1)^{1/2} || a^2-b^2 | (a-b)(a+b)
n(n+1)/2 | \frac{n(n+1)}{2} | \frac{n^2+n}{2} || \frac{n(n-1)}{2} | \frac12n(n-1) || a_1+a_2 | a_2+a_1
x_1 | x_{1} || \alpha+\beta | \beta+\alpha
\frac{\sqrt{6}+\sqrt{2}}{4} | \cos 15^\circ | \frac{\sqrt{2}+\sqrt{6}}{4}
8 | 8 \text{ ways} | 8\ \text{ways} | 8\;\text{ways} | 2^3 | 2^{3} || 70 | 70. || 70 \text{ mph} | 70
12\text{ feet} | 12 | 12 feet || \frac{1}{4}\text{ cup} | 0.25 || 2\sqrt{3} | 2\sqrt{3}\text{ units}
\frac{\pi}{4} | \frac{\pi}{4} \text{ radians} || 4 | 4\text{ cm}^3
12\pi | 12\pi \text{ square inches} | 12\pi\text{ in}^2 || (1,2,3) | a=1, b=2, c=3
\frac{\sqrt{2}}{2} | \sqrt{2}/2 | \sin 45^\circ | \sin\left(45^{\circ}\right) || \frac{3}{2\pi} | 3/(2\pi)
y = -\frac{2}{3}x + 4 | 2x+3y=12 || \sqrt{\frac{2}{3}} | \frac{\sqrt6}{3}
e^{i\pi/3} | \frac{1+i\sqrt{3}}{2} || \frac{1+i\sqrt{3}}{2} | \frac12+\frac{\sqrt3}{2}i || \text{2 hours} | 2
18.90 | \text{\$18.90} || \$5 | $\$5$ || 1 \frac{1}{2} | 1.5 || \frac{x^2}{9}+\frac{y^2}{4}=1 | 4x^2+9y^2=36
(x-2)^2+(y+3)^2=16 | (y+3)^2+(x-2)^2 = 16 || \frac{4}{3}\pi r^3 | \frac43 \pi r^3 || 4\pi\text{ cm}^2 | 4\pi
\left\{ (1,2), (3,4) \right\} | (1,2), (3,4) || (1,2),(3,4) | (1,2) \text{ and } (3,4) || 1+2i,1-2i | 1\pm 2i
\pm 1, \pm 2 | 1,-1,2,-2 || \sqrt{15} | \sqrt{3}\sqrt{5} || 3\sqrt3 | 3^{3/2} || \sqrt[4]{8} | 8^{0.25}
5x^2y | 5yx^{2} || t=5 | t = 5\text{ seconds} || -8 | (-2)^3 || \frac{a+b}{2} | \frac{1}{2}(a+b)
x(x+1)(x+2) | x^3+3x^2+2x || \frac{1}{x-1} | (x-1)^{-1} || 2^{100} | 4^{50} | 1267650600228229401496703205376
2^{2005} | 2^{2005} || \cos\frac{\pi}{5} | \cos(\pi/5) || \cos 36^\circ | \cos\frac{\pi}{5} || \mathbf{v} | v
-\mathbf{i}+2\mathbf{j} | 2\mathbf{j}-\mathbf{i} || (n-1)! | (n-1)! || \frac{3}{4} | 3 / 4
10,080 | 10080\text{ ways} || 2.0 | 2 || 1.20 | 1.2 || 7.5\% | 7.5 || 1.5\times10^{8} | 150{,}000{,}000
\{-1, 0, 1\} | -1,0,1 || {1,2} | 1,2 || \dfrac{-3\pm\sqrt{5}}{2} | \frac{-3+\sqrt5}{2},\frac{-3-\sqrt5}{2}
\frac{\pi}{6},\frac{5\pi}{6} | x=\frac{\pi}{6},\frac{5\pi}{6} | \left\{\frac{\pi}{6},\frac{5\pi}{6}\right\}
90 | \angle A = 90^\circ | m\angle A = 90^\circ || \frac{1}{6} | P = \frac{1}{6} | P(A) = \frac{1}{6}
2 | x+y=2 || \infty | +\infty || \text{Tuesday} | Tuesday. || x^2 - 5x + 6 | x^{2}-5x+6
\frac{9}{7} | 1\frac{2}{7} | 1 \frac 27
\begin{pmatrix} 3 \\ -1 \end{pmatrix} | \begin{bmatrix}3\\-1\end{bmatrix}
\frac{1}{2}, \frac{1}{3} | 0.5, 1/3 || five | \text{five} || y^4-2y^3+7y^2+y-5 | y^4 - 2 y^3 + 7 y^2 + y - 5
5\sqrt{2}\text{ cm} | 5\sqrt2 || 3\times 4 | 12 || 6\text{ and }8 | 6, 8 || 2\frac{1}{2} | 2\tfrac{1}{2}
x = \frac{1}{2} | \frac{1}{2} = x || 0 | -0 | 0.0 | 0\% || 1000000 | 10^6 || \frac{a}{b} | a/b | a \div b
a^{2b} | (a^b)^2 || 72 | **72** | Total = 72 | \text{Area} = 72\text{ cm}^2 || x^2 | x**2
"""

# A reference, then texts that differ from it, in both directions.
DIFFERENT = r"""
5 | 6 | -5 | 50 | 5.1 | 5x | 5i | 5\pi | \sqrt5 | 2x=5 | x^2=5 | x<5 | 5 or 6 | 5, 6 | 5 and 6 | \{5,6\} | 5/6
5 | 5 6 | 5! | 5^2 | 5 million | 5 squared | not 5 | 5 not | 0.05 | 4=5 | x=4=5 | \pm 5 | [5,6] | (5,5) | 5\%5
5 | five | x | ? | 5_8 | 5.0000000001 | 4.999999999 | [0,10]=5 | (1,2)=5 | 5 half | 5 \text{ Thirds}
5 | 5 squared | 5 fifths | 5 millionths | 5 factorial | ½=5 | 5² | x=5=6 | \log_1 5 | The answer is not 5
5 | 5 hundred | wrong = 5 | 5or6 | e=5 || 0.333 | 1/3 || \frac13 | 0.333 | 0.3333333333 | 0.33
\frac{2}{3} | 0.667 || \pi | 3.14 | 3.14159 | \frac{22}{7}
\sqrt2 | 1.414 | 1.41421356 | -\sqrt2 | 2 | \sqrt{3} || 50\% | 0.5 | \frac12 || 0.5 | 50\%
90^\circ | \frac{\pi}{2} | 91^\circ || 5\text{ cm} | 5\text{ m} | 5 m | 6\text{ cm} || 5 hours | 5 minutes
\$5 | 5 cents | 5% || 52_8 | 52_9 | 25_8 | 42 | 53_8
(1,2) | (2,1) | \{1,2\} | [1,2] | [1,2) | (1,3) | (1,2,3) | 2,1 || (0,9) | [0,9) | (0,9] || [0,9] | (0,9)
(0,9)\cup(9,36) | (0,36) | (0,9]\cup(9,36) | (0,9) || x\in[-2,7] | (-2,7) | -2<x<7 || x>3 | x \ge 3 | x<3 | 3
(3,\infty) | x \ge 3 || 1,-2 | 1,2 | 1 | -2 | 1,-2,3 | -1,2 || \{1,2\} | \{1,3\} | \{1\} || \pm 2 | 2 | -2
2 | \pm 2 || 1 \pm \sqrt{19} | 1 + \sqrt{19} | 2 \pm \sqrt{19} || y=2x+3 | y=2x-3 | y=3x+2 | y>2x+3 | x=2y+3
x^2+2x+1 | x^2+2x | (x-1)^2 | (x+1)^3 || x+1 | y+1 || xy | x+y || \sin x | \cos x | \sin y | \sin^{-1} x
x | |x| | \sqrt{x^2} || e^x | e^{-x} || 2+3i | 2-3i || i | -i | 1
\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}2\\1\end{pmatrix} | \begin{pmatrix}1&2\end{pmatrix}
\begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{pmatrix}1&3\\2&4\end{pmatrix}
\begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{vmatrix}1&2\\3&4\end{vmatrix}
\text{(C)} | B | A, B, C | \text{(D)} || C | B or C | AC | A | ABCD || \text{even} | odd | not even
\text{Evelyn} | Angela | Evelyn or Angela || \text{ABC} | ACB || ABC | ACB
\text{June 20} | June 21 | July 20 || 5:30 | 5:31 | 1:6 || 3:2 | 2:3 | 3/2 || 12:00 | 1:00
10^{20}+1 | 10^{20} || 2^{53}+1 | 2^{53} || 9007199254740993 | 9007199254740992
100000000000000000001 | 100000000000000000000 || 10^{-20} | 0 || \sqrt2+10^{-60} | \sqrt2
0 | 10^{-50} | 0.\overline{3} || \frac{1}{2004!} | \frac{1}{2006!} || \frac{1}{2^{99}} | \frac{1}{2^{98}}
1-\frac1e | 1+\frac1e || \pm 2021 | 2021 || n=2,3,4 | n=1,2,3 || D=(0,1) | D=(0,1.5)
1,2,\ldots,n | 1,3,5,\ldots,2n-1 || 19,46,\text{ and }82 | 21, 36, and 82 || 4 | 4\sqrt(2) || \emptyset | 0
\infty | -\infty | 10^{60} || 1,234 | 1.234 | 1,235 || 1234 | 1,2,3,4 || 12 | 1 2 | 1,2
3\frac12 | \frac{3}{2} | \frac{31}{2} || a_1 | a_2 || x=5 | y=6 | x=6 || x=1,y=2 | x=2,y=1
\frac{3}{4} | \frac{4}{3} || \ln 2 | \log 2 || \log_2 3 | \log_3 2 || 2^x | x^2
f(x)=x^2 | f(x)=x^3 | (60)=0 | 0=0 || 30^\circ | 30^\circ, 60^\circ || 70 \text{ mph} | 70 \text{ km}
1.5\text{ million} | 1.5 | 1500 || (2,3) | 2<x<3<4 || 5 kg | $5 || \tan 60 | \tan 60^\circ || 3 | 1+1=3
5\text{ cm}^2 | 5\text{ cm}^3 | 5\text{ cm} || \sin^2 x | \sin x^2 || \log x | \log_2 x || x>3 | 3
"""

# Conventions that were given up to keep the grader short: right answers that earn nothing, in either order.
GIVEN_UP = r"""
5 | 5 = x | f(2)=5 | 5 km/h | Answer: 5 | 2+3=5 | |-5| | \lfloor 5.7 \rfloor | 5!/24 | \binom{5}{1}
(-\infty,5] | x \le 5 || x \in [-2,7] | -2 \le x \le 7 || (-\infty,\infty) | \mathbb{R} || \frac{1}{2} | ½
\log_2 8 | 3 || \sin^2 x | 1-\cos^2 x || \sin^{-1} 1 | \frac{\pi}{2} || 0.1\overline{6} | \frac16 || x^2 | x²
\text{ellipse} | an ellipse || 7:30 \text{ p.m.} | 7:30 p.m. || 3:2 | 3\colon 2 || \theta | θ
12\text{ feet} | 12 ft || 4\text{ m}^2 | 4 square meters || 5\text{ million} | 5,000,000 || 2 | |AB|=2
2x+1 | f^{-1}(x) = 2x+1 || \sqrt{1/n} | \frac{1}{\sqrt{n}} || \ln(ab) | \ln a+\ln b || C | (C) 12 | C. 12
"""


def rows(table):
    """(reference, text) for every text of a table."""
    groups = [group.strip().split(" | ") for group in table.strip().replace("\n", " || ").split(" || ")]
    return [(reference, text) for reference, *texts in groups for text in texts]


@pytest.mark.parametrize("answer, predicted", rows(EQUAL))
def test_equal(answer, predicted):
    assert answers_equal(predicted, answer) and answers_equal(answer, predicted)
    assert answers_equal(answer, answer) and answers_equal(predicted, predicted)


@pytest.mark.parametrize("answer, predicted", [*rows(DIFFERENT), *rows(GIVEN_UP), ("5", "")])
def test_different(answer, predicted):
    assert not answers_equal(predicted, answer) and not answers_equal(answer, predicted)


def test_the_tables_are_whole():
    assert len(rows(EQUAL)) > 455 and len(rows(DIFFERENT)) > 185


NO_CHOICE = ["(B) or (C)", "(B), (C)", "B: not C", "(C) (B)", "ABC", "Answer", "C or B", "c", "(B) 12"]


@pytest.mark.parametrize("predicted", NO_CHOICE)
def test_no_choice(predicted):
    assert not answers_equal(predicted, "C")


@pytest.mark.parametrize("value", [5, 5.0, None, b"5", [], object()])
def test_what_is_no_text_equals_nothing(value):
    assert answers_equal(value, value) is answers_equal("5", value) is answers_equal(value, "5") is False


def math(answer):
    return Problem("q", answer)


@pytest.mark.parametrize(
    "completion, predicted",
    [
        ("<think> a </think> <answer> 5 </answer>", "5"),
        ("a </think> <answer> 5 </answer>", "5"),  # opening tag was in the prompt
        ("<think> a </think>\n<answer>\n5\n</answer>\n", "5"),
        ("<think> a </think> so \\boxed{5}", "5"),
        ("<think>a</think><answer>it is \\boxed{\\frac{1}{2}}.</answer>", "\\frac{1}{2}"),
        ("<think>\\boxed{4}</think> \\boxed{5}", "5"),
        ("<think>a</think> \\boxed{5}, indeed \\boxed{5}", "5"),
        ("<think>a</think> \\boxed{\\{1,2\\}}", "\\{1,2\\}"),
        ("<think>a</think> \\boxed{\\boxed{5}}", "\\boxed{5}"),
        ("<think>a</think> {\\boxed{5}}", "5"),
        ("<think>a</think> \\boxed{1} or \\boxed{2}", "1, 2"),
        ("<answer> 9 * 4 - 7 </answer>", "9 * 4 - 7"),
        ("<think>a</think> 5", None),
        ("<think> a <answer>5</answer>", None),  # never stopped thinking
        ("<think> <answer>5</answer> </think> done", None),
        ("<think>a</think> <answer>5</answer> <answer>6</answer>", None),
        ("<think>a</think> <answer><answer>5</answer>", None),
        ("<think>a</think> <answer>5</answer></answer>", None),
        ("<think>a</think> <answer> </answer>", None),
        ("<think>a</think> </answer>5<answer>", None),
        ("<think>a</think> <answer>5", None),
        ("<think>a</think> <answer>5 \\boxed{6}", None),
        ("<think>a</think> \\boxed{5", None),
        ("", None),
    ],
)
def test_extract_answer(completion, predicted):
    assert extract_answer(completion) == predicted


@pytest.mark.parametrize(
    "completion, predicted",
    [
        ("so the answer is 18.", "18"),
        ("#### 1,234", "1,234"),
        ("it is \\boxed{5} I think", "5"),
        ("<think> 4 <answer> 5 </answer>", "5"),
        ("= 12 so 9 * 4 - 7", "9 * 4 - 7"),
        ("no idea", None),
        ("<answer>3</answer> or <answer>4</answer>", "4"),
        ("1/2", "1/2"),
        ("x = -3.5", "-3.5"),
    ],
)
def test_extract_answer_lenient(completion, predicted):
    assert extract_answer(completion, lenient=True) == predicted


# Completions that earn nothing where the reference is 5: what an <answer> holds, then whole completions.
HOSTILE_ANSWERS = [
    "5 or 6", "5, 6", "4</answer><answer>5", "5</answer><answer>4", "\\boxed{4} \\boxed{5}", "not 5", "4 = 5",
    "</answer>5<answer>", "x = 4 = 5", "\\{4, 5\\}", "\\pm 5", "[0, 10]", "x", "answer", "True", "1 2 3 4 5",
    "5 6", "9^{9^{9^{9}}}", "9" * 10000, "(" * 5000 + "5" + ")" * 5000, "(" * 100 + "5" + ")" * 100,
    "-" * 200 + "5", "\\sqrt" * 50 + "5", "(((9^{64})^{64})^{64})^{64}", "((x^{64})^{64})^{64}", "1000000!",
    "((60!)!)!", "\\binom{10^{9}}{5}", "\\exp(\\exp(\\exp(\\exp(9))))", "1/0", "0/0", "0^{-1}", "\\infty",
    "nan", "5\x00", "5\u202e", "\\int_0^5 1 dx", "5_", "\\sum_{k=1}^{10^9} k", "\\frac{", "5," * 140 + "5",
    "${5}$ or so", "__import__('os').system('touch CANARY')", "open('CANARY','w')", "Integer(5).__class__",
    "exec(\"open('CANARY','w')\")", "sqrt.__globals__['__builtins__']['open']('CANARY','w')",
    "[open('CANARY','w') for x in [1]][0]", "(lambda: open('CANARY','w'))()", "\\write18{touch CANARY}",
    "\\input{CANARY}", "5 wrong", "\\text{5 minus}", "", " ",
]
THOUGHT = "<think> let me see </think> "
HOSTILE = [f"{THOUGHT}<answer>{text}</answer>" for text in HOSTILE_ANSWERS] + [
    THOUGHT + "\\boxed{5} \\boxed{6}", THOUGHT + "9^{9^{9^{9}}}", THOUGHT + "<answer>" * 20000 + "5",
    THOUGHT + "<answer>" * 20000 + "5" + "</answer>" * 20000, THOUGHT + "\\boxed{" * 20000 + "5",
    THOUGHT + "\\boxed{" * 5000 + "5" + "}" * 5000, THOUGHT + "{" * 50000, THOUGHT + "\\boxed " * 20000,
    "<answer>5</answer><think>", "<think><answer>5</answer>", "<think>\\boxed{5}</think>", "5", "\\boxed{5",
    "</think>", "<think> <answer>5</answer> </think> <answer>6</answer>",
    "<think> reasoning process here </think> <answer> answer here </answer>",
]


@pytest.mark.parametrize("completion", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_completions_earn_nothing(completion, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = time.process_time()
    assert grpo.accuracy_reward(completion, math("5")) == 0.0
    assert grpo.grade(completion, math("5"))[1] in ("wrong", "no_answer", "unparsable")
    extract_answer(completion, lenient=True)
    assert time.process_time() - start < 1
    assert not os.path.exists("CANARY")


@pytest.fixture
def evaluated(monkeypatch):
    """The texts that sympy or Python were asked to evaluate."""
    texts = []

    def watch(module, name):
        original = getattr(module, name)

        def watched(text, *args, **settings):
            if isinstance(text, str):
                texts.append(text)
                raise RuntimeError(text)
            return original(text, *args, **settings)

        monkeypatch.setattr(module, name, watched)

    for module in (sympy, sys.modules["sympy.core.sympify"]):
        watch(module, "sympify")
    for name in ("eval", "exec", "compile"):
        watch(builtins, name)
    yield texts
    monkeypatch.undo()


STRUCTURES = [
    "5", "x", "-2.5", r"\sqrt2", "5 cm", "2, 3", "(2, 3)", "(2, 3]", r"\{2, 3\}", "x=2", "x+y=2", "x<2",
    "x:2", r"\begin{pmatrix}2\\3\end{pmatrix}", r"\pm 2", r"\infty", "((1, 2), 3)", "2, (3, 4)", "C", "52_8",
]
WORDS = ["monday . x", "monday + 9^9^7", "monday", "open(tuesday)", "9^9^7 . x cm", r"\text{nine . nine}"]
PLACES = [
    "WORD", "WORD, 2", "2, WORD", "(WORD, 2)", "(2, WORD]", r"\{2, WORD\}", "x=WORD", "WORD:2",
    "(1, (2, WORD))", r"\begin{pmatrix}2\\WORD\end{pmatrix}", r"2, \pm 3, WORD",
]


def test_words_are_compared_and_never_evaluated(evaluated):
    """sympy's == evaluates words that stand in a tuple on its other side."""
    with_words = [place.replace("WORD", word) for place in PLACES for word in WORDS]
    for a in STRUCTURES + with_words:
        for b in with_words:
            for predicted, answer in ((a, b), (b, a)):
                start = time.process_time()
                assert grpo.compare(predicted, answer) != "error" and not evaluated, (predicted, answer)
                assert time.process_time() - start < 1


def nested(opening, closing, inside="x", depth=40):
    return opening * depth + inside + closing * depth


@pytest.mark.parametrize(
    "predicted, answer",
    [
        (r"\ln(\tan(1+10^{10}i))", "5"),  # real and imaginary part are capped each
        (r"\ln(\cot(1-10^{9}i))", "5"),
        (r"\ln(i+e^{-10^{9}})", "5"),
        (nested(r"\{1,", r"\}"), nested(r"\{", r",1\}", "y")),  # sets in sets must not be compared 2^40 times
        (nested(r"\{1,", r"\}", depth=20) + "=" + nested(r"\{", r",1\}", depth=20), "5"),
        (",".join(f"x+{n}" for n in range(50)), ",".join(f"{n}+y" for n in range(50))),
        (",".join("x" * 150), ",".join("y" * 150)),
        ("((((x^x)^x)^x)^x)", "5"),
        ("x^" * 140 + "2", "5"),
        ("a<" * 140, "5"),
        ("(x=" * 70 + "1" + ")" * 70, "5"),
        (r"\binom{2^{900}}{2^{899}}", "5"),
        (r"(10^5+\frac12)!", "5"),
        ("|" * 300, "5"),
        ("1e99" * 70, "5"),
        ("9" * 300, "9" * 299 + "8"),
        ("5" + " million" * 35, "5"),
        ("=".join([r"\arcsin(y)"] * 25), "=".join([r"\arcsin(y)"] * 24) + "=5"),  # not 2^25 comparisons
        (r"\tan(\tan(" * 10 + "x" + "))" * 10, "x"),
    ],
)
def test_time_is_bounded_whatever_both_sides_are(predicted, answer, evaluated):
    start = time.process_time()
    assert {grpo.compare(predicted, answer), grpo.compare(answer, predicted)} <= {"wrong", "unparsable"}
    assert time.process_time() - start < 1 and not evaluated


def random_expression(rng, depth):
    """A formula built to be expensive: towers, nested roots, logarithms and circular functions."""
    if depth == 0:
        return rng.choice("2 x 3 y \\pi e i 1/7 64 7.5 99999999999 \\infty 0".split())
    a, b = random_expression(rng, depth - 1), random_expression(rng, rng.choice((0, depth - 1)))
    return rng.choice([
        f"({a}+{b})", f"({a})({b})", rf"\frac{{{a}}}{{{b}}}", f"({a})^{{{b}}}", rf"\sqrt[{b}]{{{a}}}",
        rf"\log_{{{a}}}({b})", rf"\sin({a})", rf"\lfloor {a}\rfloor", f"({a})^{{64}}", f"({a})!", f"|{a}|",
        rf"\tan({a})", rf"\exp({a})", rf"\arcsin({a})", f"({a})^{{1/64}}", rf"\binom{{{a}}}{{{b}}}",
    ])


def random_text(rng, pool):
    fragments = pool + [r"\frac{", r"\sqrt{", *"{}()^_|!", "^{", r"\{", r"\pm", r"\text{"]
    kind = rng.random()
    if kind < 0.3:
        return " ".join(rng.choice(fragments) for _ in range(rng.randint(1, 12)))
    if kind < 0.5:  # damaged real answers
        text = list(rng.choice(pool))
        for _ in range(rng.randint(1, 4)):
            text[rng.randrange(len(text) + 1) : 0] = rng.choice(fragments)
            del text[rng.randrange(len(text))]
        return "".join(text)
    if kind < 0.6:
        highest = [rng.choice((127, 0x250, 0x3000)) for _ in range(rng.randint(1, 80))]
        return "".join(chr(rng.randrange(32, top)) for top in highest)
    return random_expression(rng, rng.randint(1, 6))[:300]


def test_no_text_raises_hangs_or_fails_the_grader(evaluated):
    rng, outcomes, worst = random.Random(0), set(), 0.0
    pool = [text for pair in rows(EQUAL) + rows(DIFFERENT) for text in pair]
    answers = ["5", r"\sqrt2+\sqrt3", "x^2+1", r"\{1,2\}", "(1,2)", r"\sin x", "C"]
    for _ in range(3000):
        text = random_text(rng, pool)
        answer = rng.choice(answers) if rng.random() < 0.7 else f"({text[:290]})+0"
        start = time.process_time()
        outcomes.add(grpo.compare(text, answer))
        worst = max(worst, time.process_time() - start)
        extract_answer(text), extract_answer(text, lenient=True)
    assert worst < 1 and not evaluated
    assert outcomes <= {"right", "wrong", "unparsable"}  # no "error"


def test_works_in_threads():
    results = []

    def work():
        results.append(all(answers_equal(p, a) for a, p in rows(EQUAL)[::3]))

    threads = [threading.Thread(target=work) for _ in range(4)]
    grpo.compare.cache_clear()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 4


def test_outcomes(monkeypatch):
    assert grpo.grade("<think> hm </think>", math("5")) == (None, "no_answer")
    outcomes = {"5": "right", "6": "wrong", "\\frac{": "unparsable", "5" * 400: "unparsable"}
    for predicted, outcome in outcomes.items():
        assert grpo.grade(f"<answer>{predicted}</answer>", math("5")) == (predicted, outcome)
    monkeypatch.setattr(grpo, "same", lambda a, b: {}["a mistake of ours"])
    assert grpo.compare("5.25", "21/4 + 0") == "error"  # counted, not hidden


COUNTDOWN_RIGHT = [
    "9 * 4 - 7", "9*4-7", "9 x 4 - 7", "9 × 4 − 7", "(9*4)-7", "4*9-7", "9 * 4 - 7 = 29",
    "9 * 4 - 7 = 29 ", "(((9)*((4)))-7)", "9*4\n- 7",
]
COUNTDOWN_WRONG = [
    "9 * 4 - 7 = 30", "9 * 4 - 7 = 29 = 29", "9 * 4 + 7", "29", "9 * 4 - 7 + 0", "9 * 4 - 7 * 1", "9 * 4",
    "9 ** 4", "9 * * 4 - 7", "9 // 4 - 7", "94 - 7", "9 4 - 7", "", "9 *", "9**9**9", "(" * 500, "x", "36-7",
    "__import__('os')", "9 * 4 - 7 or 1", "9*4-7; 1", "9(4) - 7", "-7 + 9*4", "9.0*4-7", "9/0*4-7", "()",
    "٩*4-7", "9e0*4-7", "9\x00*4-7", "9*4-7 = x", "9*4-7\n= 29 = ", "(9*4-7", "9*4-07", "(9*4)(-7)",
]


@pytest.mark.parametrize("expression", COUNTDOWN_RIGHT + COUNTDOWN_WRONG)
def test_countdown(expression):
    assert grpo.countdown_equal(expression, (4, 7, 9), 29) is (expression in COUNTDOWN_RIGHT)


def test_countdown_is_exact():
    assert grpo.countdown_equal("8/(3-8/3)", (3, 3, 8, 8), "24")
    problem = Problem("q", "29", "countdown", (4, 7, 9))
    thinking = "try 9 - 4 = 5 + 7 = 12 ? 29 low wait try 9 * 4 = 36 - 7 = 29 ? 29 yes"
    completion = f"<think> {thinking} </think> <answer> 9 * 4 - 7 </answer>"
    assert grpo.accuracy_reward(completion, problem) == 1


@pytest.mark.parametrize(
    "text, reward",
    [
        ("<think> a </think> b", 1),
        ("<think>\na\nb\n</think>\n<answer>1</answer>", 1),
        (" <think>a</think>b", 1),
        ("a </think> b", 0),
        ("<think> a </think>", 0),
        ("<think> a </think> \n", 0),
        ("<think> a b", 0),
        ("b", 0),
        ("", 0),
        ("</think> a <think> b", 0),
        ("<think> a </think> b </think> c", 0),
        ("<think> <think> a </think> b", 0),
        ("b <think> a </think> c", 0),
        ("<think> </think> b", 0),
        ("<THINK> a </THINK> b", 0),
    ],
)
def test_format_reward(text, reward):
    assert grpo.format_reward(text, math("5")) == reward


@pytest.mark.parametrize(
    "text, share",
    [  # vectors computed by hand
        ("So x = 3, wait", 1.0),
        ("So 我们 add two", 0.6),
        ("我们先算 two plus two", 3 / 7),
        ("12 + 3 = 15", 1.0),
        ("", 1.0),
        ("<think> try 9 试 4 </think> 我们", 0.5),
        ("try 试 </think> 我们", 0.5),
        ("$αβγ$ two", 1.0),
        ("\\frac two", 1.0),
        ("да two", 0.5),
    ],
)
def test_language_reward(text, share):
    assert grpo.language_reward(text, math("")) == pytest.approx(share)


SQUARE = Problem("q", task="code", tests=("assert square(2) == 4", "assert square(-3) == 9"))


def fenced(program):
    return f"<think> hm </think> Here:\n```python\n{program}\n```\nDone."


@pytest.mark.parametrize(
    "program, problem, reward",
    [
        ("def square(x):\n    return x * x", SQUARE, 1),
        ("def square(x):\n    return 4", SQUARE, 0),
        ("print('noise', end='')\ndef square(x):\n    return x * x", SQUARE, 1),
        ("def square(x):\n    return x * x\nif __name__ == '__main__': raise ValueError", SQUARE, 1),
        ("def square(x):\n    return x * x\nraise ValueError", SQUARE, 0),
        ("import sys; sys.exit(0)", SQUARE, 0),
        ("import os; os._exit(0)", SQUARE, 0),
        ("raise SystemExit(0)", SQUARE, 0),
        ("print('passed')", SQUARE, 0),
        ("def square(x):\n    import os; os._exit(0)", SQUARE, 0),
        ("def square(x): return x * x\nexit()", SQUARE, 0),
        ("import sys; print(sys.stdin.read())\ndef square(x): raise KeyError", SQUARE, 0),
        ("def square(x)", SQUARE, 0),
    ],
)
def test_code_reward(program, problem, reward):
    assert grpo.code_reward(fenced(program), problem) == reward


def test_code_reward_takes_the_last_closed_block_after_the_thinking():
    right, wrong = "```python\ndef square(x): return x*x\n```", "```\ndef square(x): return x\n```"
    assert grpo.code_reward(wrong + "\n" + right, SQUARE) == 1
    assert grpo.code_reward(right + "\n" + wrong, SQUARE) == 0
    assert grpo.code_reward(f"<think>{right}</think> done", SQUARE) == 0
    assert grpo.code_reward(right[:-3], SQUARE) == 0
    assert grpo.code_reward(right, Problem("q", task="code")) == 0  # no tests prove nothing
    assert grpo.accuracy_reward(right, SQUARE) == 1


@pytest.mark.parametrize(
    "program, tests, outcomes",
    [
        ("while True: pass", SQUARE.tests, ("timeout",)),
        ("while True: print('x' * 10 ** 6)", SQUARE.tests, ("wrong", "timeout")),
        ("", (), ("error",)),
        ("def square(x): return '\ud800'", SQUARE.tests, ("error",)),
    ],
)
def test_what_a_program_does_has_an_outcome(program, tests, outcomes):
    start = time.monotonic()
    assert grpo.run_tests(program, tests, time_limit_seconds=1) in outcomes
    assert time.monotonic() - start < 60


@pytest.mark.skipif(sys.platform == "win32", reason="memory is limited where the system has `resource`")
def test_code_memory_hog():
    program = "x = []\nwhile True: x.append(bytearray(10 ** 7))"
    assert grpo.run_tests(program, SQUARE.tests, time_limit_seconds=60) == "wrong"


@pytest.mark.skipif(sys.platform == "win32", reason="process groups")
def test_code_fork_and_grandchild_are_killed(tmp_path):
    mark = tmp_path / "alive"
    program = (
        "import os, time\nif os.fork() == 0:\n    while True:\n        time.sleep(0.05)\n"
        f"        open({str(mark)!r}, 'a').write('.')\ntime.sleep(0.3)\ndef square(x): return x * x"
    )
    assert grpo.run_tests(program, SQUARE.tests, time_limit_seconds=5) == "right"
    time.sleep(0.2)
    size = mark.stat().st_size
    time.sleep(0.4)
    assert size > 0 and mark.stat().st_size == size


def test_code_has_no_environment_no_handles_and_its_own_folder(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "1")
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    program = (
        f"import os\ntry: os.fstat({writer}); handle = True\nexcept OSError: handle = False\n"
        "open('here', 'w').write('left')"
    )
    tests = "'SECRET_TOKEN' not in os.environ", f"os.getcwd() != {os.getcwd()!r}", "not handle", "os.stat('here')"
    assert grpo.run_tests(program, [f"assert {test}" for test in tests]) == "right"
    assert grpo.run_tests(program, ["assert handle"]) == "wrong" and not os.path.exists("here")
    os.close(reader)
    os.close(writer)
