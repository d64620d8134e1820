"""Rewards: every convention of answer equality, adversarial completions, fuzzing, code containment."""

import builtins
import json
import os
import random
import sys
import threading
import time

import pytest
import sympy

import grpo
from grpo import Problem, answers_equal, extract_answer

# reference | prediction, equal in both directions
EQUAL = r"""
\frac12 | 1/2
\frac12 | 0.5
\frac12 | .5
\frac12 | \dfrac{1}{2}
\frac12 | \tfrac12
\frac12 | \frac{2}{4}
\frac12 | $\frac{1}{2}$
\frac12 | \frac 12
\frac{1}{2} | \frac1{2}
\frac{1}{2} | \frac{1}2
\frac{1}{2} | 1/2.
\frac{1}{2} | (1/2)
\frac{1}{2} | \left(\frac{1}{2}\right)
\frac{1}{2} | \boxed{\frac{1}{2}}
\frac{1}{2} | \[\frac{1}{2}\]
\frac{1}{2} | \(\frac{1}{2}\)
\frac{1}{2} | ½
\frac{1}{2} | 2^{-1}
\frac{1}{2} | \displaystyle\frac{1}{2}
-\frac{35}{9} | -35/9
-\frac{35}{9} | \frac{-35}{9}
-\frac{35}{9} | \frac{35}{-9}
-\frac{35}{9} | −35/9
-\frac{35}{9} | -3\frac{8}{9}
1234 | 1,234
1234 | 1{,}234
1234 | 1,\!234
1234 | 1\,234
1,234 | 1234
1,234 | 1234.0
1,234 | $1234
1,234 | \$1,234
1,234 | 1,234 dollars
1,234,567 | 1234567
11,\! 111,\! 111,\! 100 | 11111111100
11,\! 111,\! 111,\! 100 | 11,111,111,100
10,\!000 | 10000
10,\!000 | 10^4
5 | \$5
5 | $5
5 | $5$
5 | \$5.00
5 | 5.
5 | 5.0
5 | 5.00
5 | 05
5 | +5
5 | x=5
5 | x = 5
5 | $x=5$
5 | 5 = x
5 | n=5
5 | f(2)=5
5 | AB=5
5 | AB = 5\text{ cm}
5 | a+b=5
5 | \angle ABC = 5^\circ
5 | 5 apples
5 | 5 cm
5 | 5\text{ cm}
5 | 5\,\text{cm}
5 | 5\mathrm{~cm}
5 | 5 \mathrm{cm}^2
5 | 5\text{ cm}^2
5 | 5\text{ square units}
5 | 5 square centimeters
5 | 5 miles per hour
5 | 5 mph
5 | 5 km/h
5 | 5\text{ km/h}
5 | 5 hours
5 | 5 days
5 | 5\text{ days}
5 | 5\%
5 | 5%
5 | 5 percent
5 | 5^\circ
5 | 5°
5 | 5^{\circ}
5 | 5 degrees
5 | 5\text{ degrees}
5 | 5 dollars
5 | \text{5}
5 | \mathbf{5}
5 | \textbf{5}
5 | {5}
5 | \{5\}
5 | The answer is 5
5 | The final answer is $5$.
5 | Answer: 5
5 | \frac{10}{2}
5 | \frac{10}{2} = 5
5 | 2+3
5 | 2+3=5
5 | \sqrt{25}
5 | |-5|
5 | 5\text{th}
5 | 5th
5 | \lfloor 5.7 \rfloor
5 | \lceil 4.2\rceil
5 | 5!/24
5 | \binom{5}{1}
x=5 | 5
x=5 | x = 5
50\% | 50
50\% | 50%
50\% | 50 percent
90^\circ | 90
90^\circ | 90°
90^\circ | 90 degrees
90^\circ | 90^{\circ}
90^\circ | 90\text{ degrees}
90^\circ | 90\,^\circ
\$18.90 | 18.90
\$18.90 | 18.9
\$18.90 | \$18.9
\$18.90 | $18.90$
\$18.90 | 18.90 dollars
\$18.90 | \frac{189}{10}
\$32,\!348 | 32348
\$32,\!348 | \$32,348
5.4 \text{ cents} | 5.4
5.4 \text{ cents} | 5.4 cents
15\mbox{ cm}^2 | 15
15\mbox{ cm}^2 | 15 \text{ cm}^2
15\mbox{ cm}^2 | 15 cm^2
\frac{270}7\text{ degrees} | \frac{270}{7}
\frac{270}7\text{ degrees} | \frac{270}{7}^\circ
\sqrt2 | \sqrt{2}
\sqrt2 | √2
\sqrt2 | sqrt(2)
\sqrt2 | 2^{1/2}
\sqrt2 | 2^{\frac{1}{2}}
\sqrt2 | \frac{2}{\sqrt{2}}
11\sqrt2 | 11\sqrt{2}
11\sqrt2 | 11 \cdot \sqrt{2}
11\sqrt2 | \sqrt{242}
3\sqrt{13} | 3 \sqrt{13}
3\sqrt{13} | \sqrt{117}
3\sqrt{13} | 3*sqrt(13)
\frac{\sqrt{3}}{3} | \frac{1}{\sqrt{3}}
\frac{\sqrt{3}}{3} | 1/\sqrt{3}
\frac{\sqrt{3}}{3} | \frac{\sqrt3}3
\sqrt[3]{2} | 2^{1/3}
\sqrt[3]{4} | \sqrt[3]4
\sqrt[3]{4} | 4^{\frac13}
1+\sqrt{2} | \sqrt{2}+1
\sqrt{3}-\sqrt{2} | \frac{1}{\sqrt{3}+\sqrt{2}}
2\pi | 2π
2\pi | 2 \pi
2\pi | 2*pi
2\pi | \pi \cdot 2
2\pi | 2pi
\pi | π
\frac{\pi}{2} | \pi/2
\frac{\pi}{2} | \frac{1}{2}\pi
\frac{\pi}{2} | 0.5\pi
6 - 5i | 6-5i
6 - 5i | -5i+6
6 - 5i | 6-5\mathrm{i}
6 - 5i | 6 - 5 \cdot i
-2 + 7i | 7i-2
-2 + 7i | 7i - 2
\left( 3, \frac{\pi}{2} \right) | (3,\pi/2)
\left( 3, \frac{\pi}{2} \right) | \left(3,\frac{\pi}{2}\right)
\left( 3, \frac{\pi}{2} \right) | (3, \frac{\pi}{2})
\left( 3, \frac{\pi}{2} \right) | (r,\theta) = (3, \frac{\pi}{2})
(1,2) | (1, 2)
(1,2) | \left(1,2\right)
(1,2) | 1,2
(1,2) | x=1,y=2
(1,2) | (x,y)=(1,2)
(1,2) | \langle 1,2\rangle
(1.5, 2) | (3/2, 2)
1,-2 | -2,1
1,-2 | 1, -2
1,-2 | x=1,-2
1,-2 | x=1, x=-2
1,-2 | x = 1 or x = -2
1,-2 | x=1 \text{ or } x=-2
1,-2 | 1 and -2
1,-2 | 1 \text{ and } -2
1,-2 | \{1,-2\}
1,-2 | \{-2,1\}
1,-2 | -2 and 1
1,2,3 | 1, 2, and 3
3, 5, 7 | 3,5,7
3, 5, 7 | 7, 5, 3
3, 5, 7 | 3, 5, and 7
3, 5, 7 | \{3,5,7\}
3, 5, 7 | 3, 5, \text{ and } 7
\{1,2\} | \{2,1\}
\{1,2\} | 1,2
\{1,2\} | \left\{1,2\right\}
\{1,2\} | \lbrace 1, 2\rbrace
\{1\pm\sqrt{5},-2\} | \{-2,1+\sqrt5,1-\sqrt5\}
\{1\pm\sqrt{5},-2\} | 1+\sqrt{5}, 1-\sqrt{5}, -2
\{1\pm\sqrt{5},-2\} | 1 \pm \sqrt{5}, -2
1 \pm \sqrt{19} | 1+\sqrt{19},1-\sqrt{19}
1 \pm \sqrt{19} | x = 1\pm\sqrt{19}
1 \pm \sqrt{19} | 1 ± √19
\pm 2 | 2,-2
\pm 2 | -2, 2
\pm 2 | ±2
\pm 2 | x=\pm 2
\pm 2 | \{-2,2\}
\frac{1\pm\sqrt{5}}{2} | \frac{1+\sqrt5}{2}, \frac{1-\sqrt5}{2}
[-2,7] | x \in [-2,7]
x \in [-2,7] | [-2,7]
x \in [-2,7] | [-2, 7]
x \in [-2,7] | -2 \le x \le 7
x \in [-2,7] | -2 \leq x \leq 7
(0,9) \cup (9,36) | (0,9)\cup(9,36)
(0,9) \cup (9,36) | (9,36)\cup(0,9)
(0,9) \cup (9,36) | (0, 9) ∪ (9, 36)
(0,9) \cup (9,36) | x \in (0,9) \cup (9,36)
\left(\frac{3}{5},\frac{8}{3}\right] | (3/5, 8/3]
\left(\frac{3}{5},\frac{8}{3}\right] | \left( 0.6, \frac83 \right]
(-\infty,5] | x \le 5
(-\infty,5] | x \leq 5
(-\infty, 5] | (-inf, 5]
(-\infty, 5] | (-∞,5]
(3,\infty) | x>3
(3,\infty) | x > 3
(3,\infty) | (3, +\infty)
(3,\infty) | 3<x
x>3 | x > 3
x \ge 3 | x \geq 3
x \ge 3 | 3 \le x
x \ge 3 | [3,\infty)
(-\infty,-2)\cup(2,\infty) | x<-2 or x>2
(-\infty,-2)\cup(2,\infty) | x < -2 \text{ or } x > 2
(-\infty,-2)\cup(2,\infty) | (2,\infty)\cup(-\infty,-2)
(-\infty,\infty) | \mathbb{R}
\text{all real numbers} | all real numbers
52_8 | 52_{8}
52_8 | 52_8
52_8 | (52)_8
52_8 | 52_{\text{8}}
2516_8 | 2516_{8}
4343_6 | 4343_{6}
11011_2 | 11011_{2}
y = 2x + 3 | y=2x+3
y = 2x + 3 | 2x+3
y = 2x + 3 | y = 3+2x
y = 2x + 3 | 2x - y + 3 = 0
y = 2x + 3 | y=3+2x
3x+4y-12=0 | 6x+8y-24=0
3x+4y=12 | 3x+4y-12=0
x^2+y^2=1 | y^2+x^2=1
x^2+y^2=1 | 1 = x^2+y^2
x^2+2x+1 | (x+1)^2
x^2+2x+1 | 1+2x+x^2
x^3+3x-6 | x^3 + 3x - 6
x^3+3x-6 | x^{3}+3x-6
x^3+3x-6 | x**3 + 3*x - 6
x^3+3x-6 | -6+3x+x^3
x^3+3x-6 | p(x)=x^3+3x-6
x^3+3x-6 | f(x) = x^3+3x-6
(2x+1)(x-3) | 2x^2-5x-3
(2x+1)(x-3) | (x-3)(2x+1)
(2x+1)(x-3) | (x - 3) \cdot (2x + 1)
6r^2-4r-24 | 6r^2 - 4r - 24
6r^2-4r-24 | 2(3r^2-2r-12)
p - q | p-q
p - q | -q+p
p - q | -(q-p)
2k+2 | 2(k+1)
3R^2 | 3 R^2
3R^2 | 3R^{2}
\frac{x+2}{x} | 1+\frac{2}{x}
\frac{x}{2} | 0.5x
\frac{x}{2} | x/2
\frac{x}{2} | \frac{1}{2}x
xy | yx
2xy | 2yx
e^x | e^{x}
e^{2} | e^2
e^{2} | \exp(2)
\ln 2 | \ln(2)
\ln 2 | \ln{2}
\ln 2 | -\ln\frac{1}{2}
\ln 4 | 2\ln 2
\log_2 8 | 3
\log_{10} 100 | 2
\log_2 3 | \frac{\ln 3}{\ln 2}
\log_2 3 | \log_{2}(3)
\sin x | \sin(x)
\sin^2 x | (\sin x)^2
\sin^2 x | 1-\cos^2 x
\sin 2x | 2\sin x\cos x
\tan 60^\circ | \sqrt3
\cot x | \frac{\cos x}{\sin x}
2\cos(a) | 2 \cos a
\arcsin 1 | \frac{\pi}{2}
\sin^{-1} 1 | \frac{\pi}{2}
3^{20} | 3486784401
3.2 \times 10^5 | 320000
3.2 \times 10^5 | 3.2e5
3.2 \times 10^5 | 3.2 \cdot 10^{5}
3.2 \times 10^5 | 320,000
6.72 \times 10^{-5} | .0000672
2^{10} | 1024
2^10 | 1024
10! | 3628800
0.\overline{3} | \frac13
0.\overline{3} | 1/3
0.1\overline{6} | \frac16
1.\overline{27} | \frac{14}{11}
1\frac{4}{5} | \frac95
1\frac{4}{5} | 1.8
1\frac{4}{5} | 1 4/5
1\frac{4}{5} | 9/5
3\frac{1}{2} | 3.5
3\frac12 | \frac{7}{2}
3\frac{1}{2}\text{ hours} | 3.5
\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix} | \begin{pmatrix}-\frac13\\\frac23\\\frac53\end{pmatrix}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | \begin{pmatrix}1&2\\3&4\end{pmatrix}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | \begin{bmatrix}1&2\\3&4\end{bmatrix}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | \left[\begin{array}{cc}1&2\\3&4\end{array}\right]
\begin{pmatrix} 1 \\ 2 \end{pmatrix} | \begin{pmatrix} 1 \\ 2 \\ \end{pmatrix}
\begin{pmatrix} 1/2 \\ 1 \end{pmatrix} | \frac12\begin{pmatrix} 1 \\ 2 \end{pmatrix}
\begin{pmatrix} -1 \\ -2 \end{pmatrix} | -\begin{pmatrix} 1 \\ 2 \end{pmatrix}
\text{(C)} | C
\text{(C)} | (C)
\text{(C)} | \text{C}
(\text{C}) | C
C | \text{(C)}
C | (C)
C | \textbf{(C)}
C | \mathrm{C}
C | C.
C | $C$
\text{C} | C
E | \text{E}
\text{even} | even
\text{even} | Even
\text{Evelyn} | Evelyn
\text{Evelyn} | \text{evelyn}
\text{Evelyn} | \textbf{Evelyn}
\text{odd} | odd
\text{yes} | Yes
\text{no} | No
\text{June 20} | June 20
\text{June 20} | june 20
\text{Monday} | Monday
\text{Monday} | monday.
\text{no solution} | no solution
\text{no solution} | No solution
\text{ellipse} | ellipse
\text{ellipse} | an ellipse
\text{ellipse} | \text{an ellipse}
A,B,C | A, B, C
A, B | \text{A, B}
\text{A and B} | A and B
\emptyset | \varnothing
\emptyset | ∅
5:30 | 5:30
7:30 \text{ p.m.} | 7:30 p.m.
3:2 | 3 : 2
3:2 | 3\colon 2
3:4:5 | 3 : 4 : 5
2.5 | \frac{5}{2}
2.5 | 5/2
2.5 | 2\frac12
2.5 | 2.50
0.35625 | .35625
-50 | -50.0
-50 | - 50
-50 | −50
\frac{3}{56} | \frac{6}{112}
\frac{3}{56} | 3/56
\frac{243}{625} | 0.3888
\frac{243}{625} | 38.88/100
13535 | 13,535
2220 | 2{,}220
58,500 | 58500
58,500 | 58500.00
-1 | i^2
-1 | -1
2+\sqrt{3} | \sqrt{3} + 2
\frac{2+\sqrt{3}}{2} | 1+\frac{\sqrt3}{2}
x^{1/3} | \sqrt[3]{x}
x^{\frac12} | \sqrt{x}
\frac{1}{x^2} | x^{-2}
\sqrt{x^2+1} | (x^2+1)^{1/2}
a^2-b^2 | (a-b)(a+b)
n(n+1)/2 | \frac{n(n+1)}{2}
n(n+1)/2 | \frac{n^2+n}{2}
\frac{n(n-1)}{2} | \frac12n(n-1)
a_1+a_2 | a_2+a_1
x_1 | x_{1}
\theta | θ
2\theta | 2θ
\alpha+\beta | \beta+\alpha
\frac{\sqrt{6}+\sqrt{2}}{4} | \cos 15^\circ
\frac{\sqrt{6}+\sqrt{2}}{4} | \frac{\sqrt{2}+\sqrt{6}}{4}
8 | 8 \text{ ways}
8 | 8\ \text{ways}
8 | 8\;\text{ways}
8 | 2^3
8 | 2^{3}
6 | 3!
70 | 70.
70 \text{ mph} | 70
12\text{ feet} | 12
12\text{ feet} | 12 ft
12\text{ feet} | 12 feet
12\text{ inches} | 12 in
12\text{ inches} | 12\text{ in.}
10\text{ seconds} | 10 sec
1.5\text{ million} | 1500000
5\text{ million} | 5,000,000
6\text{ square meters} | 6\text{ m}^2
\frac{1}{4}\text{ cup} | 0.25
2\sqrt{3} | 2\sqrt{3}\text{ units}
\frac{\pi}{4} | \frac{\pi}{4} \text{ radians}
4 | 4\text{ cm}^3
12\pi | 12\pi \text{ square inches}
12\pi | 12\pi\text{ in}^2
0.\overline{12} | \frac{12}{99}
0.1\overline{23} | \frac{61}{495}
1,2,3 | a=1, b=2, c=3
(1,2,3) | a=1, b=2, c=3
2x+1 | f^{-1}(x) = 2x+1
\frac{\sqrt{2}}{2} | \sqrt{2}/2
\frac{3}{2\pi} | 3/(2\pi)
\left[-\frac{1}{2}, \infty\right) | x\ge-1/2
(-\infty,-2]\cup[4,\infty) | x\le-2\text{ or }x\ge 4
y = -\frac{2}{3}x + 4 | 2x+3y=12
\sqrt{\frac{2}{3}} | \frac{\sqrt6}{3}
e^{i\pi/3} | \frac{1+i\sqrt{3}}{2}
\frac{1+i\sqrt{3}}{2} | \frac12+\frac{\sqrt3}{2}i
120 | \binom{10}{3}
\text{2 hours} | 2
18.90 | \text{\$18.90}
\$5 | $\$5$
1 \frac{1}{2} | 1.5
\frac{x^2}{9}+\frac{y^2}{4}=1 | 4x^2+9y^2=36
(x-2)^2+(y+3)^2=16 | (y+3)^2+(x-2)^2 = 16
\frac{4}{3}\pi r^3 | \frac43 \pi r^3
4\pi\text{ cm}^2 | 4\pi
\left\{ (1,2), (3,4) \right\} | (1,2), (3,4)
(1,2),(3,4) | (1,2) \text{ and } (3,4)
1+2i,1-2i | 1\pm 2i
\pm 1, \pm 2 | 1,-1,2,-2
\sqrt{15} | \sqrt{3}\sqrt{5}
3\sqrt3 | 3^{3/2}
\sqrt[4]{8} | 8^{0.25}
5x^2y | 5yx^{2}
t=5 | t = 5\text{ seconds}
5 | 5\text{ units}^2
5 | 5\text{ sq. units}
5 | 5\text{ sq. ft.}
5 | 5\text{ cubic feet}
5 | 5\text{ feet per second}
5 | 5\text{ m/s}
5 | 5\,\mathrm{m/s}
5 | 5\ \mathrm{kg}
5 | 5\text{ km}
5 | 5\text{ L}
5 | 5^\circ\text{C}
5 | 5°C
-8 | (-2)^3
-2 | \sqrt[3]{-8}
\frac{a+b}{2} | \frac{1}{2}(a+b)
x(x+1)(x+2) | x^3+3x^2+2x
\frac{1}{x-1} | (x-1)^{-1}
2^{100} | 4^{50}
2^{100} | 1267650600228229401496703205376
2^{2005} | 2^{2005}
\cos\frac{\pi}{5} | \cos(\pi/5)
\cos 36^\circ | \cos\frac{\pi}{5}
\mathbf{v} | v
-\mathbf{i}+2\mathbf{j} | 2\mathbf{j}-\mathbf{i}
\frac{n!}{2} | n!/2
(n-1)! | (n-1)!
x \neq 2 | x\ne2
\frac{3}{4} | 3 / 4
10,080 | 10080\text{ ways}
2.0 | 2
1.20 | 1.2
7.5\% | 7.5
1.5\times10^{8} | 150{,}000{,}000
\{-1, 0, 1\} | -1,0,1
{1,2} | 1,2
\dfrac{-3\pm\sqrt{5}}{2} | \frac{-3+\sqrt5}{2},\frac{-3-\sqrt5}{2}
\frac{\pi}{6},\frac{5\pi}{6} | x=\frac{\pi}{6},\frac{5\pi}{6}
\frac{\pi}{6},\frac{5\pi}{6} | \left\{\frac{\pi}{6},\frac{5\pi}{6}\right\}
90 | \angle A = 90^\circ
90 | m\angle A = 90^\circ
\frac{1}{6} | P = \frac{1}{6}
\frac{1}{6} | P(A) = \frac{1}{6}
\frac{1}{6} | P(A\cap B)=\frac16
2 | |AB|=2
2 | x+y=2
\infty | +\infty
\text{Tuesday} | Tuesday.
x^2 - 5x + 6 | x^{2}-5x+6
\frac{9}{7} | 1\frac{2}{7}
\frac{9}{7} | 1 \frac 27
\frac{\sqrt{2}}{2} | \sin 45^\circ
\frac{\sqrt{2}}{2} | \sin\left(45^{\circ}\right)
\begin{pmatrix} 3 \\ -1 \end{pmatrix} | \begin{bmatrix}3\\-1\end{bmatrix}
\sqrt{1/n} | \frac{1}{\sqrt{n}}
\ln(ab) | \ln a+\ln b
\frac{1}{2}, \frac{1}{3} | 0.5, 1/3
5 | 5.\overline{0}
five | \text{five}
y^4-2y^3+7y^2+y-5 | y^4 - 2 y^3 + 7 y^2 + y - 5
5\sqrt{2}\text{ cm} | 5\sqrt2
3\times 4 | 12
6\text{ and }8 | 6, 8
2\frac{1}{2} | 2\tfrac{1}{2}
x = \frac{1}{2} | \frac{1}{2} = x
0 | -0
0 | 0.0
0 | 0\%
1000000 | 10^6
1000000 | 1 million
\frac{a}{b} | a/b
\frac{a}{b} | a \div b
a^{2b} | (a^b)^2
"""

# reference | prediction, different in both directions
DIFFERENT = r"""
5 | 6
5 | -5
5 | 50
5 | 5.1
5 | 5x
5 | 5i
5 | 5\pi
5 | \sqrt5
5 | 2x=5
5 | x^2=5
5 | x<5
5 | 5 or 6
5 | 5, 6
5 | 5 and 6
5 | \{5,6\}
5 | 5/6
5 | 5 6
5 | 5!
5 | 5^2
5 | 5 million
5 | 5 squared
5 | not 5
5 | 5 not
5 | 0.05
5 | 4=5
5 | x=4=5
5 | \pm 5
5 | [5,6]
5 | (5,5)
5 | 5\%5
5 | five
5 | 
5 | x
5 | ?
5 | 5_8
5 | 5.0000000001
5 | 4.999999999
0.333 | 1/3
\frac13 | 0.333
\frac13 | 0.3333333333
\frac13 | 0.33
\frac{2}{3} | 0.667
\pi | 3.14
\pi | 3.14159
\pi | \frac{22}{7}
\sqrt2 | 1.414
\sqrt2 | 1.41421356
\sqrt2 | -\sqrt2
\sqrt2 | 2
\sqrt2 | \sqrt{3}
50\% | 0.5
50\% | \frac12
0.5 | 50\%
90^\circ | \frac{\pi}{2}
90^\circ | 91^\circ
5\text{ cm} | 5\text{ m}
5\text{ cm} | 5 m
5\text{ cm} | 6\text{ cm}
5 hours | 5 minutes
\$5 | 5 cents
\$5 | 5%
52_8 | 52_9
52_8 | 25_8
52_8 | 42
52_8 | 53_8
(1,2) | (2,1)
(1,2) | \{1,2\}
(1,2) | [1,2]
(1,2) | [1,2)
(1,2) | (1,3)
(1,2) | (1,2,3)
(1,2) | 2,1
(0,9) | [0,9)
(0,9) | (0,9]
[0,9] | (0,9)
(0,9)\cup(9,36) | (0,36)
(0,9)\cup(9,36) | (0,9]\cup(9,36)
(0,9)\cup(9,36) | (0,9)
x\in[-2,7] | (-2,7)
x\in[-2,7] | -2<x<7
x>3 | x \ge 3
x>3 | x<3
x>3 | 3
(3,\infty) | x \ge 3
1,-2 | 1,2
1,-2 | 1
1,-2 | -2
1,-2 | 1,-2,3
1,-2 | -1,2
\{1,2\} | \{1,3\}
\{1,2\} | \{1\}
\pm 2 | 2
\pm 2 | -2
2 | \pm 2
1 \pm \sqrt{19} | 1 + \sqrt{19}
1 \pm \sqrt{19} | 2 \pm \sqrt{19}
y=2x+3 | y=2x-3
y=2x+3 | y=3x+2
y=2x+3 | y>2x+3
y=2x+3 | x=2y+3
x^2+2x+1 | x^2+2x
x^2+2x+1 | (x-1)^2
x^2+2x+1 | (x+1)^3
x+1 | y+1
xy | x+y
\sin x | \cos x
\sin x | \sin y
x | |x|
x | \sqrt{x^2}
e^x | e^{-x}
2+3i | 2-3i
i | -i
i | 1
\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}2\\1\end{pmatrix}
\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}1&2\end{pmatrix}
\begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{pmatrix}1&3\\2&4\end{pmatrix}
\begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{vmatrix}1&2\\3&4\end{vmatrix}
\text{(C)} | B
\text{(C)} | A, B, C
\text{(C)} | \text{(D)}
C | B or C
C | AC
C | A
C | ABCD
\text{even} | odd
\text{even} | not even
\text{Evelyn} | Angela
\text{Evelyn} | Evelyn or Angela
\text{ABC} | ACB
ABC | ACB
\text{June 20} | June 21
\text{June 20} | July 20
5:30 | 5:31
5:30 | 1:6
3:2 | 2:3
12:00 | 1:00
3:2 | 3/2
10^{20}+1 | 10^{20}
2^{53}+1 | 2^{53}
9007199254740993 | 9007199254740992
100000000000000000001 | 100000000000000000000
10^{-20} | 0
\sqrt2+10^{-60} | \sqrt2
0 | 10^{-50}
\frac{1}{2004!} | \frac{1}{2006!}
\frac{1}{2^{99}} | \frac{1}{2^{98}}
1-\frac1e | 1+\frac1e
\pm 2021 | 2021
n=2,3,4 | n=1,2,3
D=(0,1) | D=(0,1.5)
1,2,\ldots,n | 1,3,5,\ldots,2n-1
19,46,\text{ and }82 | 21, 36, and 82
4 | 4\sqrt(2)
\emptyset | 0
\infty | -\infty
\infty | 10^{60}
1,234 | 1.234
1,234 | 1,235
1234 | 1,2,3,4
12 | 1 2
12 | 1,2
3\frac12 | \frac{3}{2}
3\frac12 | \frac{31}{2}
a_1 | a_2
x=5 | y=6
x=5 | x=6
x=1,y=2 | x=2,y=1
\frac{3}{4} | \frac{4}{3}
\ln 2 | \log 2
\log_2 3 | \log_3 2
2^x | x^2
f(x)=x^2 | f(x)=x^3
30^\circ | 30^\circ, 60^\circ
70 \text{ mph} | 70 \text{ km}
1.5\text{ million} | 1.5
1.5\text{ million} | 1500
"""


def rows(table):
    return [tuple(part.strip() for part in line.split(" |", 1)) for line in table.strip().split("\n")]


@pytest.mark.parametrize("answer, predicted", rows(EQUAL))
def test_equal(answer, predicted):
    assert answers_equal(predicted, answer) and answers_equal(answer, predicted)
    assert answers_equal(answer, answer) and answers_equal(predicted, predicted)


@pytest.mark.parametrize("answer, predicted", rows(DIFFERENT))
def test_different(answer, predicted):
    assert not answers_equal(predicted, answer) and not answers_equal(answer, predicted)


@pytest.mark.parametrize(
    "predicted, outcome",
    [
        ("(C) 12", "right"),
        (r"\textbf{(C)}\ 12", "right"),
        (r"\text{(C) } 12", "right"),
        ("C) 12", "right"),
        ("C. 12", "right"),
        ("(B) 12", "wrong"),
        ("(B) or (C)", "wrong"),
        ("(B), (C)", "wrong"),
        ("B: not C", "wrong"),
        ("(C) (B)", "wrong"),
        ("ABC", "wrong"),
        ("Answer", "wrong"),
        ("C or B", "wrong"),
        ("c", "wrong"),
    ],
)
def test_choices(predicted, outcome):
    assert (grpo.compare(predicted, "C") == "right") is (outcome == "right")


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


THOUGHT = "<think> let me see </think> "
HOSTILE = [
    THOUGHT + text
    for text in (
        "<answer>5 or 6</answer>",
        "<answer>5, 6</answer>",
        "<answer>4</answer><answer>5</answer>",
        "<answer>5</answer><answer>4</answer>",
        "\\boxed{5} \\boxed{6}",
        "<answer>\\boxed{4} \\boxed{5}</answer>",
        "<answer></answer>5",
        "<answer>not 5</answer>",
        "<answer>4 = 5</answer>",
        "<answer>x = 4 = 5</answer>",
        "<answer>\\{4, 5\\}</answer>",
        "<answer>\\pm 5</answer>",
        "<answer>[0, 10]</answer>",
        "<answer>x</answer>",
        "<answer>answer</answer>",
        "<answer>True</answer>",
        "<answer>1 2 3 4 5</answer>",
        "<answer>5 6</answer>",
        "<answer>" * 20000 + "5",
        "<answer>" * 20000 + "5" + "</answer>" * 20000,
        "\\boxed{" * 20000 + "5",
        "\\boxed{" * 5000 + "5" + "}" * 5000,
        "{" * 50000,
        "9^{9^{9^{9}}}",
        "<answer>9^{9^{9^{9}}}</answer>",
        "<answer>" + "9" * 10000 + "</answer>",
        "<answer>" + "(" * 5000 + "5" + ")" * 5000 + "</answer>",
        "<answer>" + "(" * 100 + "5" + ")" * 100 + "</answer>",
        "<answer>" + "-" * 200 + "5</answer>",
        "<answer>" + "\\sqrt" * 50 + "5</answer>",
        "<answer>(((9^{64})^{64})^{64})^{64}</answer>",
        "<answer>((x^{64})^{64})^{64}</answer>",
        "<answer>1000000!</answer>",
        "<answer>((60!)!)!</answer>",
        "<answer>\\binom{10^{9}}{5}</answer>",
        "<answer>\\exp(\\exp(\\exp(\\exp(9))))</answer>",
        "<answer>1/0</answer>",
        "<answer>0/0</answer>",
        "<answer>0^{-1}</answer>",
        "<answer>\\infty</answer>",
        "<answer>nan</answer>",
        "<answer>5\x00</answer>",
        "<answer>5\u202e</answer>",
        "<answer>\\int_0^5 1 dx</answer>",
        "<answer>5_</answer>",
        "<answer>\\sum_{k=1}^{10^9} k</answer>",
        "<answer>\\frac{</answer>",
        "<answer>" + "5," * 140 + "5</answer>",
        "<answer>__import__('os').system('touch CANARY')</answer>",
        "<answer>open('CANARY','w')</answer>",
        "<answer>sqrt.__globals__['__builtins__']['open']('CANARY','w')</answer>",
        "<answer>exec(\"open('CANARY','w')\")</answer>",
        "<answer>[open('CANARY','w') for x in [1]][0]</answer>",
        "<answer>(lambda: open('CANARY','w'))()</answer>",
        "<answer>Integer(5).__class__</answer>",
        "<answer>\\write18{touch CANARY}</answer>",
        "<answer>\\input{CANARY}</answer>",
        "<answer>${5}$ or so</answer>",
    )
] + [
    "<answer>5</answer><think>",
    "<think><answer>5</answer>",
    "<think>\\boxed{5}</think>",
    "5",
    "\\boxed{5",
    "</think>",
    "<think> <answer>5</answer> </think> <answer>6</answer>",
    "<think> reasoning process here </think> <answer> answer here </answer>",
]


@pytest.mark.parametrize("completion", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_completions_earn_nothing(completion, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = time.process_time()
    assert grpo.accuracy_reward(completion, math("5")) == 0.0
    assert grpo.verify(extract_answer(completion), math("5")) in ("wrong", "no_answer", "unparsable")
    extract_answer(completion, lenient=True)
    assert time.process_time() - start < 1
    assert not os.path.exists("CANARY")


def random_expression(rng, depth):
    """A formula built to be expensive: towers, nested roots, logarithms and circular functions."""
    if depth == 0:
        return rng.choice(
            ["2", "x", "3", "y", r"\pi", "e", "i", "1/7", "64", "7.5", "99999999999", r"\infty", "0"]
        )
    a, b = random_expression(rng, depth - 1), random_expression(rng, rng.choice((0, depth - 1)))
    return rng.choice(
        [
            f"({a}+{b})",
            f"({a})({b})",
            rf"\frac{{{a}}}{{{b}}}",
            f"({a})^{{{b}}}",
            rf"\sqrt[{b}]{{{a}}}",
            rf"\log_{{{a}}}({b})",
            rf"\sin({a})",
            f"|{a}|",
            rf"\lfloor {a}\rfloor",
            f"({a})^{{64}}",
            f"({a})!",
            rf"\tan({a})",
            rf"\exp({a})",
            rf"\arcsin({a})",
            f"({a})^{{1/64}}",
        ]
    )


def random_text(rng, pool):
    fragments = pool[0] + [
        r"\frac{",
        r"\sqrt{",
        "{",
        "}",
        "(",
        ")",
        "^{",
        "^",
        "_",
        "|",
        "!",
        r"\{",
        r"\pm",
        r"\text{",
    ]
    kind = rng.random()
    if kind < 0.3:
        return " ".join(rng.choice(fragments) for _ in range(rng.randint(1, 12)))
    if kind < 0.5:  # damaged real answers
        text = list(rng.choice(pool[0]))
        for _ in range(rng.randint(1, 4)):
            text[rng.randrange(len(text) + 1) : 0] = rng.choice(fragments)
            del text[rng.randrange(len(text))]
        return "".join(text)
    if kind < 0.6:
        return "".join(
            chr(rng.choice((rng.randrange(32, 127), rng.randrange(0x250), rng.randrange(0x3000))))
            for _ in range(rng.randint(1, 80))
        )
    return random_expression(rng, rng.randint(1, 6))[:300]


def test_no_text_raises_hangs_or_fails_the_verifier():
    rng, outcomes, worst = random.Random(0), {}, 0.0
    pool = [[text for row in rows(EQUAL) + rows(DIFFERENT) for text in row if text]]
    answers = ["5", r"\sqrt2+\sqrt3", "x^2+1", r"\{1,2\}", "(1,2)", r"\sin x", "C"]
    for _ in range(5000):
        text = random_text(rng, pool)
        answer = rng.choice(answers) if rng.random() < 0.7 else f"({text[:290]})+0"
        start = time.process_time()
        outcome = grpo.verify(text, math(answer))
        worst = max(worst, time.process_time() - start)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        extract_answer(text), extract_answer(text, lenient=True)
    assert worst < 1
    assert set(outcomes) <= {"right", "wrong", "unparsable", "no_answer"}, outcomes  # no "error"


STRUCTURES = [
    "5", "x", "-2.5", r"\sqrt2", "5 cm", "2, 3", "(2, 3)", "(2, 3]", r"\{2, 3\}", "x=2", "x+y=2", "x<2", "x:2",
    r"\begin{pmatrix}2\\3\end{pmatrix}", r"\pm 2", r"\infty", "((1, 2), 3)", "2, (3, 4)", "C", "52_8",
]
WORDS = ["monday . x", "monday + 9^9^7", "monday", "open(tuesday)", "9^9^7 . x cm", r"\text{nine . nine}"]
WITH_WORDS = WORDS + [
    shape.replace("WORD", word)
    for word in WORDS
    for shape in ("WORD, 2", "2, WORD", "(WORD, 2)", "(2, WORD]", r"\{2, WORD\}", "x=WORD", "WORD:2", "(1, (2, WORD))",
                  r"\begin{pmatrix}2\\WORD\end{pmatrix}", r"2, \pm 3, WORD")
]


@pytest.fixture
def evaluated(monkeypatch):
    """The texts that sympy or Python were asked to evaluate."""
    texts, core = [], sys.modules["sympy.core.sympify"]

    def watch(module, name):
        original = getattr(module, name)

        def watched(text, *args, **settings):
            if isinstance(text, str):
                texts.append(text)
                raise RuntimeError(text)
            return original(text, *args, **settings)

        monkeypatch.setattr(module, name, watched)

    for module, name in ((core, "sympify"), (sympy, "sympify"), (builtins, "eval"), (builtins, "exec")):
        watch(module, name)
    return texts


def test_words_are_compared_and_never_evaluated(evaluated):
    for a in STRUCTURES + WITH_WORDS:
        for b in WITH_WORDS:
            for predicted, answer in ((a, b), (b, a)):
                start = time.process_time()
                assert grpo.compare(predicted, answer) != "error" and not evaluated, (predicted, answer)
                assert time.process_time() - start < 1


@pytest.mark.parametrize("text", [r"\ln(\tan(1+10^{10}i))", r"\ln(\cot(1-10^{9}i))", r"\ln(i+e^{-10^{9}})"])
def test_real_and_imaginary_part_are_capped_each(text):
    start = time.process_time()
    assert grpo.compare(text, "5") == grpo.compare("5", text) == "unparsable"
    assert time.process_time() - start < 1


def test_works_in_threads():
    results = []

    def work():
        results.append(all(answers_equal(p, a) for a, p in rows(EQUAL)[::3]))

    threads = [threading.Thread(target=work) for _ in range(4)]
    grpo.compare.cache_clear()
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert results == [True] * 4


def test_outcomes():
    assert grpo.verify("5", math("5")) == "right"
    assert grpo.verify("6", math("5")) == "wrong"
    assert grpo.verify(None, math("5")) == "no_answer"
    assert grpo.verify("\\frac{", math("5")) == "unparsable"
    assert grpo.verify("5" * 400, math("5")) == "unparsable"


def test_a_broken_verifier_is_counted_not_hidden(monkeypatch):
    def broken(*_):
        raise RuntimeError

    monkeypatch.setattr(grpo, "same", broken)
    assert grpo.verify("5.25", math("21/4 + 0")) == "error"


@pytest.mark.parametrize(
    "expression, right",
    [
        ("9 * 4 - 7", True),
        ("9*4-7", True),
        ("9 x 4 - 7", True),
        ("9 × 4 − 7", True),
        ("(9*4)-7", True),
        ("4*9-7", True),
        ("9 * 4 - 7 = 29", True),
        ("9 * 4 - 7 = 30", False),
        ("9 * 4 - 7 = 29 = 29", False),
        ("9 * 4 + 7", False),
        ("29", False),
        ("9 * 4 - 7 + 0", False),
        ("9 * 4 - 7 * 1", False),
        ("9 * 4", False),
        ("9 ** 4", False),
        ("9 * * 4 - 7", False),
        ("9 // 4 - 7", False),
        ("94 - 7", False),
        ("9 4 - 7", False),
        ("", False),
        ("9 *", False),
        ("9**9**9", False),
        ("(" * 90 + "9*4-7" + ")" * 90, True),
        ("(" * 500, False),
        ("__import__('os')", False),
        ("9 * 4 - 7 or 1", False),
        ("9*4-7; 1", False),
        ("9(4) - 7", False),
        ("-7 + 9*4", False),
        ("36-7", False),
        ("9.0*4-7", False),
        ("x", False),
        ("9/0*4-7", False),
        ("٩*4-7", False),
        ("9e0*4-7", False),
        ("9\x00*4-7", False),
    ],
)
def test_countdown(expression, right):
    assert grpo.countdown_equal(expression, (4, 7, 9), 29) is right


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
    if text and share < 1 and "да" not in text:
        assert grpo.language_reward(text, math(""), "zh") == pytest.approx(1 - share)


def test_check_references():
    bad = [
        Problem("q", "5\x00"),
        Problem("q", "1" * 400),
        Problem("q", ""),
        Problem("q", "x", "countdown", (1, 2)),
        Problem("q", "", "code"),
    ]
    good = [
        Problem("q", "\\frac12"),
        Problem("q", "3", "countdown", (1, 2)),
        Problem("q", "", "code", tests=("assert 1",)),
    ]
    assert grpo.check_references(bad + good) == bad


SQUARE = Problem("q", task="code", tests=("assert square(2) == 4", "assert square(-3) == 9"))
DOUBLE = Problem(
    "q", task="code", tests=({"input": "3\n", "output": "6\n"}, {"input": "5\n", "output": "10"})
)


def fenced(program):
    return f"<think> hm </think> Here:\n```python\n{program}\n```\nDone."


@pytest.mark.parametrize(
    "program, problem, reward",
    [
        ("def square(x):\n    return x * x", SQUARE, 1),
        ("def square(x):\n    return 4", SQUARE, 0),
        ("print(2 * int(input()))", DOUBLE, 1),
        ("print(6)", DOUBLE, 0),
        ("import sys; sys.exit(0)", DOUBLE, 0),
        ("print(2 * int(input())); raise ValueError", DOUBLE, 0),
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


def test_code_endless_loop_is_a_timeout():
    start = time.monotonic()
    assert grpo.run_tests("while True: pass", SQUARE.tests, time_limit_seconds=1) == "timeout"
    assert time.monotonic() - start < 60


@pytest.mark.skipif(sys.platform == "win32", reason="memory is limited where the system has `resource`")
def test_code_memory_hog():
    program = "x = []\nwhile True: x.append(bytearray(10 ** 7))"
    assert grpo.run_tests(program, SQUARE.tests, time_limit_seconds=5, memory_limit_mb=256) == "wrong"


def test_code_output_is_bounded():
    program = "while True: print('x' * 10 ** 6)"
    assert grpo.run_tests(program, DOUBLE.tests, time_limit_seconds=3) in ("wrong", "timeout")


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
        "import os, json\nfacts = ['SECRET_TOKEN' in os.environ, os.getcwd()]\n"
        f"try: os.fstat({writer}); facts.append('handle')\nexcept OSError: pass\nprint(json.dumps(facts))"
    )
    status, output = grpo.run_contained(program, "", False, 5.0, 512)
    facts = json.loads(output)
    assert status == 0 and facts[0] is False and facts[1] != os.getcwd() and not os.path.exists(facts[1])
    assert "handle" not in facts
    os.close(reader), os.close(writer)
