#include <chrono>
#include <cstdio>
#include <cmath>
#include <random>
static long FE,EX,DEAL,ROUND; static double TDEAL,TREP;
static double now(){return std::chrono::duration<double,std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();}
#include "eplb_distinct.h"
using namespace lplb::eplb;
int main(int c,char**v){
  int E=atoi(v[1]),S=atoi(v[2]),G=atoi(v[3]),N=atoi(v[4]),P=atoi(v[5]); double sig=atof(v[6]);
  std::vector<int64_t> phy(S),cnt(E); std::vector<int32_t> cp(S); std::vector<float> w(E),gl(G);
  double mt=0; long mFE=0,mEX=0,mD=0; double tot=0; double q=0;
  for(int seed=0;seed<60;++seed){ std::mt19937 g(seed); std::lognormal_distribution<double> d(0,sig);
    for(auto&x:w)x=d(g); for(int i=0;i<G;++i){gl[i]=0;for(int k=0;k<E/G;++k)gl[i]+=w[i*(E/G)+k];}
    FE=EX=DEAL=ROUND=0;TDEAL=TREP=0; Sizes z{E,S,G,N,P}; static Distinct D(z);
    double t=now(); D.place(w.data(),gl.data(),{phy.data(),cp.data(),cnt.data()}); t=now()-t; tot+=t;
    std::vector<double> L(P); double sum=0; for(int s=0;s<S;++s)L[s/(S/P)]+=w[phy[s]]/cnt[phy[s]]; double m=0; for(double x:L)m=std::max(m,x),sum+=x; q+=m*P/sum;
    if(t>mt||c>7)printf("seed %d ms %.2f FE %ld EX %ld deals %ld rounds %ld tdeal %.2f trep %.2f ratio %.4f\n",seed,t,FE,EX,DEAL,ROUND,TDEAL,TREP,m*P/sum);
    mt=std::max(mt,t);mFE=std::max(mFE,FE);mEX=std::max(mEX,EX);mD=std::max(mD,DEAL);}
  printf("%d %d %d %d %d s%.1f: max ms %.2f mean %.3f maxFE %ld maxEX %ld maxdeal %ld  ratio %.5f\n",E,S,G,N,P,sig,mt,tot/60,mFE,mEX,mD,q/60);
}
